"""What flags are made of: dataclasses in groups, marks on their fields, checks of their values."""

from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

T = TypeVar("T")

_TOO_LARGE = 2**40
_LONG = 2000  # characters


class UsageError(Exception):
    """What the user asked for cannot be done; it names the flag, the value and the way out."""

    def __str__(self) -> str:
        text = super().__str__()  # may quote a value as long as a document
        return text if len(text) <= _LONG else f"{text[: _LONG // 2]} ... {text[-_LONG // 2 :]}"


class AtLeast(NamedTuple):
    """Marks a flag whose numbers are finite and no smaller than this."""

    limit: int


MAY_CHANGE = "may change when a run is resumed: it moves no number but for rounding"
OF_ONE_DATA_SET = "says how to read one data set, and nothing of another"
NO_FLAG = "is found by the run, and not given"
SECRET = "is never written down"


def refuse(cfg: Any, flag: str, why: str) -> None:
    """Raise UsageError for the value that a flag has in `cfg`."""
    raise UsageError(f"--{flag} {getattr(cfg, flag)}: {why}")


def check_values(cfg: Any) -> None:
    """Raise UsageError for a value of the wrong type, below its `AtLeast`, or out of proportion."""
    for f in fields(cfg):
        value: Any = getattr(cfg, f.name)
        if not _fits(value, f.type):
            raise UsageError(f"--{f.name} {value!r}: is not of the type that this flag takes")
        limits = [mark.limit for mark in _marks(f) if isinstance(mark, AtLeast)]
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int) and abs(number) >= _TOO_LARGE:
                refuse(cfg, f.name, "must be less than 2^40 in size")
            is_number = not isinstance(number, str | NoneType)
            if is_number and any(not n <= number < float("inf") for n in limits):
                refuse(cfg, f.name, f"must be at least {limits[0]}, and finite")


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a flag's annotated type; a whole number is a float too."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _fits(value, inner[0])
    if origin in (Union, UnionType):
        return any(_fits(value, option) for option in inner)
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, inner[0]) for item in value)
    if kind in (int, float):
        numbers = Integral if kind is int else Real
        return isinstance(value, numbers) and not isinstance(value, bool)
    return value is None if kind is NoneType else isinstance(value, kind)


def flags_of(cfg: Any) -> dict[str, Any]:
    """Flag -> value of a config and the groups in it, without what is secret or no flag."""
    hidden = {SECRET, NO_FLAG}
    shown = ((group, f) for group, f in _flags(cfg) if not hidden.intersection(_marks(f)))
    return {f.name: getattr(group, f.name) for group, f in shown}


def flags_marked(cfg: Any, mark: str) -> set[str]:
    """Names of the flags with this mark."""
    return {f.name for _, f in _flags(cfg) if mark in _marks(f)}


def from_flags(cls: type[T], flags: dict[str, Any]) -> T:
    """A config, and the groups in it, from flags by their names; the rest have their defaults."""
    values = {}
    for f in fields(cls):  # type: ignore[arg-type]  # cls and its groups are dataclasses
        if is_dataclass(f.default):
            values[f.name] = from_flags(type(f.default), flags)
        elif f.name in flags:
            value = flags[f.name]
            values[f.name] = tuple(value) if isinstance(value, list) else value
    return cls(**values)


def _flags(cfg: Any) -> Iterator[tuple[Any, Field[Any]]]:
    for f in fields(cfg):
        value = getattr(cfg, f.name)
        if is_dataclass(value):
            yield from _flags(value)
        else:
            yield cfg, f


def _marks(f: Field[Any]) -> tuple[Any, ...]:
    return get_args(f.type)[1:] if get_origin(f.type) is Annotated else ()
