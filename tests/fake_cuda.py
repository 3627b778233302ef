"""A GPU that is not there: its tensors have shapes and no values; what is asked of it is noted.

Needs a torch that was built for CUDA, and no driver. Tensors on the CPU stay real.
"""

import linecache
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parent.parent
aten = torch.ops.aten


class Question(NamedTuple):
    """What made the host wait until the device had done all that was queued."""

    operator: str
    place: str
    """The line of the project that asked."""


class FakeCuda(TorchDispatchMode):
    """Inside, `cuda` is a device whose tensors have shapes alone; `asked` is what it was asked.

    Tensors of two devices in one operator raise, as on a GPU. Questions are answered as by a run in
    which all is well: numbers are 1, comparisons true, half of every mask is set.
    """

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Question] = []
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._pinned: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        to_gpu = device is not None and torch.device(device).type == "cuda"
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if not to_gpu and not any(isinstance(t, FakeTensor) for t in tensors):
            return func(*args, **kwargs)
        name = func.__name__.split(".")[0]
        if answer := getattr(self, f"_answer_{name}", None):
            answered = answer(func, args, kwargs)
            if answered is not NotImplemented:
                return answered
        with self._fake:
            return func(*args, **kwargs)

    def ask(self, operator: str) -> None:
        """Note a question, and which line of the project asks it."""
        frame, place = sys._getframe(1), "elsewhere"
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            parts = path.relative_to(ROOT).parts if path.is_relative_to(ROOT) else ("",)
            if parts[0] in ("sae", "train_sae.py"):
                line = linecache.getline(str(path), frame.f_lineno).strip()
                place = f"{path.relative_to(ROOT)}:{frame.f_lineno}: {line}"
                break
            frame = frame.f_back
        self.asked.append(Question(operator, place))

    def pin(self, tensor: Tensor) -> Tensor:
        """The tensor in memory that the device copies from by itself."""
        pinned = tensor.clone()
        self._pinned.add(pinned.data_ptr())
        return pinned

    def _answer__local_scalar_dense(self, func: Any, args: Any, kwargs: Any) -> Any:
        self.ask("item")
        return {True: 1.0, False: 1}[args[0].is_floating_point()]

    def _answer_equal(self, func: Any, args: Any, kwargs: Any) -> Any:
        self.ask("equal")
        return True

    def _answer_allclose(self, func: Any, args: Any, kwargs: Any) -> Any:
        self.ask("allclose")
        return True

    def _answer_nonzero(self, func: Any, args: Any, kwargs: Any) -> Any:
        self.ask("nonzero")
        return self._half_of(args[0])

    def _half_of(self, mask: Tensor) -> Tensor:
        return mask.new_empty(math.ceil(mask.numel() / 2), mask.ndim, dtype=torch.int64)

    def _answer_index(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A mask is turned into numbers of entries, whose count the host waits for."""
        found: list[Tensor | None] = []
        for index in args[1]:
            if index is not None and index.device.type == "cpu":
                self.ask("copy to the device")
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                self.ask("index by a mask")
                found += self._half_of(index).unbind(1)
            else:
                found.append(index)
        with self._fake:
            return func(args[0], found)

    def _answer_index_put_(self, func: Any, args: Any, kwargs: Any) -> Any:
        masked = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if masked and args[2].numel() != 1:  # of one number it is masked_fill_
            self.ask("put by a mask")
            return args[0]
        return NotImplemented

    def _answer_bincount(self, func: Any, args: Any, kwargs: Any) -> Any:
        self.ask("bincount")
        return args[0].new_empty(args[-1])

    def _answer_isin(self, func: Any, args: Any, kwargs: Any) -> Any:
        if args[1].numel() >= 10 * args[0].numel() ** 0.145:  # above this CUDA sorts both
            self.ask("isin")
        return NotImplemented

    def _answer__to_copy(self, func: Any, args: Any, kwargs: Any) -> Any:
        source, device = args[0], kwargs.get("device")
        if device is None or torch.device(device).type == source.device.type:
            return NotImplemented
        if isinstance(source, FakeTensor):
            self.ask("copy to the host")
            return torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        self._ask_of_copy(source, kwargs.get("non_blocking"))
        return NotImplemented

    def _answer_copy_(self, func: Any, args: Any, kwargs: Any) -> Any:
        target, source, *more = args
        if target.device.type == source.device.type:
            return NotImplemented
        if isinstance(source, FakeTensor):
            self.ask("copy to the host")
            return target.fill_(1)
        self._ask_of_copy(source, kwargs.get("non_blocking", bool(more and more[0])))
        return NotImplemented

    def _ask_of_copy(self, source: Tensor, non_blocking: bool | None) -> None:
        if not non_blocking or source.data_ptr() not in self._pinned:
            self.ask("copy to the device")


class _AtOnce:
    """In place of a pool of threads: what is submitted is done."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> "_AtOnce":
        return self

    def __exit__(self, *_: Any) -> None: ...

    def submit(self, function: Callable[[], Any]) -> Any:
        result = function()
        return type("Done", (), {"result": staticmethod(lambda: result)})


@contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """Inside, there is a fake GPU; gradients are computed without the engine, which needs one."""
    gpu = FakeCuda()

    def tolist(tensor: FakeTensor) -> Any:
        gpu.ask("tolist")
        return torch.ones(tensor.shape, dtype=tensor.dtype).tolist()

    with ExitStack() as stack:
        for target, replacement in {
            "torch.cuda._lazy_init": lambda: None,
            "torch.cuda.current_device": lambda: 0,
            "torch.cuda._exchange_device": lambda device: -1,
            "torch.cuda._maybe_exchange_device": lambda device: -1,
            "torch.Tensor.pin_memory": lambda tensor: gpu.pin(tensor),
            "torch._subclasses.FakeTensor.tolist": tolist,
            "torch.Tensor.backward": lambda loss: backward([loss]),
            "torch.autograd.grad": gradients,
            "sae.placement.ranks.ThreadPoolExecutor": _AtOnce,
            # Of tensors without values it asks nothing, as of those that it traces.
            "transformers.utils.import_utils.is_fake_tensor": lambda tensor: False,
        }.items():
            stack.enter_context(patch(target, replacement))
        # As FakeTensorMode does: a number becomes a tensor on the CPU, which is then seen to move.
        torch._C._ensureCUDADeviceGuardSet()
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        stack.enter_context(gpu)
        yield gpu


def backward(roots: Sequence[Tensor], of: Sequence[Tensor] | None = None) -> dict[int, Tensor]:
    """What the autograd engine does, node by node: add gradients to leaves, or return those `of`.

    The keys are the ids of the leaves.
    """
    nodes: list[Any] = []
    seen: set[Any] = set()

    def visit(node: Any) -> None:  # after all that it leads to
        if node is None or node in seen:
            return
        seen.add(node)
        for following, _ in node.next_functions:
            visit(following)
        nodes.append(node)

    waiting: dict[Any, list[Tensor | None]] = {}

    def give(node: Any, slot: int, gradient: Tensor | None) -> None:
        if node is None or gradient is None:
            return
        expected = node._input_metadata
        gradient = gradient.sum_to_size(expected[slot].shape).to(expected[slot].dtype)
        kept = waiting.setdefault(node, [None] * len(expected))
        kept[slot] = gradient if kept[slot] is None else kept[slot] + gradient

    found: dict[int, Tensor] = {}
    with torch.no_grad():
        for root in roots:
            visit(root.grad_fn)
            give(root.grad_fn, root.output_nr, torch.ones_like(root))
        for node in reversed(nodes):
            gradient = waiting.pop(node, None)
            if gradient is None:
                continue
            if hasattr(node, "variable"):
                leaf, total = node.variable, gradient[0]
                found[id(leaf)] = total
                if of is None:
                    leaf.grad = total if leaf.grad is None else leaf.grad + total
                continue
            leads_to = node.next_functions
            if isinstance(node, torch.autograd.function.BackwardCFunction):  # written in Python
                given = zip(node.needs_input_grad, node.apply(*gradient), strict=True)
                parts = [part for needed, part in given if needed]
                leads_to = [edge for edge in leads_to if edge[0] is not None]
            else:
                parts = node(*gradient)
                parts = parts if isinstance(parts, tuple) else (parts,)
            for (following, slot), part in zip(leads_to, parts, strict=True):
                give(following, slot, part)
    return found


def gradients(loss: Tensor, parameters: Sequence[Tensor], **_: Any) -> tuple[Tensor | None, ...]:
    """What `torch.autograd.grad` returns."""
    found = backward([loss], parameters)
    return tuple(found.get(id(parameter)) for parameter in parameters)
