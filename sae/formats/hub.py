"""Folders of coders on the Hub: ORG/NAME, ORG/NAME@REVISION, ORG/NAME@REVISION/FOLDER."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from huggingface_hub import get_token, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..flag_checks import UsageError
from . import kinds
from .sparsify import check_name, newest_coders

T = TypeVar("T")

_TRIES, _LONGEST_WAIT = 5, 60  # seconds
_FILES = ("*.json", "*.safetensors", "*.npz", "*.yaml")


class HubName(NamedTuple):
    """What a name on the Hub stands for."""

    repo: str
    revision: str | None
    folder: str | None

    @classmethod
    def parse(cls, name: str) -> "HubName":
        """Take a name apart. Raises UsageError for what is none, or a folder that leads out."""
        repo, revision = r"([^/@]+(?:/[^/@]+)?)", r"(?:@(refs/[^/]+/[^/]+|[^/]+))?"
        found = re.fullmatch(rf"{repo}{revision}(?:/([^@]+))?", name)
        if found is None:
            raise UsageError(
                f"{name} is neither a folder here nor on the Hub, where names are ORG/NAME or "
                f"ORG/NAME@REVISION/FOLDER"
            )
        if found[3] is not None:
            check_name(found[3])
        return cls(found[1], found[2], found[3] and found[3].strip("/"))


def coders_folder(
    name: str | Path,
    local: bool | None = None,
    pattern: str | None = None,
    allow_pt: bool = False,
    token: str | None = None,
) -> Path:
    """The folder of the coders of a folder, a run or a Hub repository.

    `local` forces (True) or forbids (False) reading `name` as a folder. Of a repository only the
    folders that the glob `pattern` matches are downloaded, and pickles only with `allow_pt`;
    `token` stands in for HF_TOKEN.
    """
    if local or (local is None and Path(name).exists()):
        return newest_coders(Path(name))
    return _snapshot(str(name), pattern, allow_pt, token)


def coder_folder(
    name: str, hookpoint: str | None = None, allow_pt: bool = False, token: str | None = None
) -> Path:
    """The folder of one coder of a Hub repository, downloaded; its only one without a name."""
    check_name(hookpoint or "")
    root = _snapshot(name, hookpoint, allow_pt, token)
    folder = root if hookpoint is None else root / hookpoint
    if kinds.kind_of(folder) is None:
        what = "is not one coder" if hookpoint is None else f"has no coder at hookpoint {hookpoint}"
        raise UsageError(f"{name} {what}: name one of its folders as the hookpoint")
    return folder


def _snapshot(name: str, pattern: str | None, allow_pt: bool, token: str | None) -> Path:
    repo, revision, folder = HubName.parse(name)
    inside = "/".join(part for part in (folder, pattern) if part)
    files = (*_FILES, *(("*.pt",) if allow_pt else ()))
    wanted = [f"{inside}/{file}" if inside else file for file in files]
    # A run that was pushed holds the same coders again in the files of other programs.
    beside = [] if inside else [f"{kind}/*" for kind in kinds.KINDS if kind != "sparsify"]
    try:
        root = _download(repo, revision, wanted, beside, token)
        if beside and not kinds.holds_coders(root):
            root = _download(repo, revision, wanted, [], token)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UsageError(_why_not(repo, revision, error)) from None
    found = root / folder if folder else root
    if folder and not found.is_dir():
        raise UsageError(f"{repo} has no folder {folder} with coders in it")
    return found


def _download(
    repo: str, revision: str | None, wanted: list[str], unwanted: list[str], token: str | None
) -> Path:
    """The folder with those files of a repository, but for what only exact resuming needs."""
    ignored = ["*resume*.safetensors", *unwanted]

    def download() -> str:
        return snapshot_download(
            repo, revision=revision, token=token, allow_patterns=wanted, ignore_patterns=ignored
        )

    return Path(patiently(download))


def patiently(call: Callable[[], T]) -> T:
    """What a call of the Hub returns; where the Hub is busy, after as long as it asks to wait."""
    for tries_left in reversed(range(_TRIES)):
        try:
            return call()
        except (HfHubHTTPError, LocalEntryNotFoundError) as error:
            answer = response_of(error)
            if answer is None or answer.status_code != 429 or not tries_left:
                raise
            asked = answer.headers.get("Retry-After", "")
            time.sleep(min(int(asked) if asked.isdecimal() else 5, _LONGEST_WAIT))
    raise AssertionError("the last try returns or raises")


def response_of(error: BaseException | None) -> Any:
    """What the Hub answered where a call failed; it may lie below another error."""
    while error is not None:
        if (answer := getattr(error, "response", None)) is not None:
            return answer
        error = error.__cause__
    return None


def _why_not(repo: str, revision: str | None, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0]
    if isinstance(error, GatedRepoError):
        return f"{repo} is gated: ask for access on its page, and set HF_TOKEN to your token"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} has no revision {revision}: give one of its branches, tags or commits"
    status = getattr(response_of(error), "status_code", None)
    if status == 429:
        return f"{repo}: the Hub takes no more requests for now (429); try again later"
    if status in (401, 403) and get_token() and not isinstance(error, RepositoryNotFoundError):
        why = "one that the Hub does not know, or that may not read this"
        return f"{repo}: HF_TOKEN is {why} ({status}): make a new one in your settings there"
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403):
        return (
            f"{repo} is neither a folder here nor on the Hub, or it is private: set HF_TOKEN to "
            f"your token ({reason})"
        )
    return f"{repo} is neither a folder here nor on the Hub ({reason})"
