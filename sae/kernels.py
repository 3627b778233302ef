"""Fast twins of what functional.py defines: same signatures, numbers and gradients.

What makes them fast, on the CPU and, through the same PyTorch operators, on a GPU:

- `pre_acts` exist only for some rows at a time. The backward needs the indices and the values of
  the active latents alone.
- The top k, and the top of the dead latents, come from one pass in C (native.py), or a tournament
  over group maxima.
- The gradient of `top_acts` is a sampled product; N x K x D is never built.
- Both weight gradients are sums of rows by latent, over one sort of `top_indices`.

Every sum has a fixed order, so a step repeats bit for bit.
"""

import warnings
from contextlib import suppress
from types import ModuleType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from . import native
from .config import Activation, UsageError

# The sampled product goes through a CSR tensor, which warns of its beta state at first use.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support")

# Rows of pre_acts at a time: a CPU's product lays the weights out anew for every chunk.
_CHUNK_ROWS = 1024
_CHUNK_ON_GPU = 2**27  # elements that fill one
_GROUP = 8


Choice = Literal["auto", "torch", "native"]
_choice: Choice = "auto"


def choose(choice: Choice, device: torch.device) -> str:
    """Set from now on what computes selections, sparse sums and updates, and say it in words.

    `native` is C on the CPU and Triton (for the sums) on CUDA, `torch` PyTorch's operators, `auto`
    native where it can be had. The numbers are the same but for the order of sums. Raises
    UsageError where `native` cannot be had.
    """
    global _choice
    _choice = choice
    if choice == "torch":
        return "PyTorch's operators"
    if device.type == "cpu" and native.library() is not None:
        return "C for all but the products"
    if device.type == "cuda":
        with suppress(ImportError):
            _in_triton(device)
            return "PyTorch's operators for the selection, Triton for the sums"
    if choice == "native":
        raise UsageError(
            "--kernels native: needs a C compiler on the CPU, Triton on CUDA; use auto or torch"
        )
    _choice = "torch"
    return "PyTorch's operators"


def in_c(*tensors: Tensor, table: Tensor | None = None) -> bool:
    """Whether what is done with these tensors is done in C; a table may be bfloat16."""
    return _choice != "torch" and native.serves(*tensors, table=table)


def _in_triton(device: torch.device) -> ModuleType | None:
    if _choice == "torch" or device.type != "cuda":
        return None
    from . import triton_kernels  # there is no Triton where there is no GPU

    return triton_kernels


def encode(
    x: Float[Tensor, "N D"],
    W_enc: Float[Tensor, "L D"],
    b_enc: Float[Tensor, " L"],
    k: int,
    activation: Activation = "topk",
    pre_bias: Float[Tensor, " D"] | None = None,
    matmul_dtype: torch.dtype | None = None,
) -> tuple[Float[Tensor, "N K"], Int[Tensor, "N K"]]:
    """Twin of `functional.encode`."""
    found = _Encode.apply(x, W_enc, b_enc, k, activation, pre_bias, matmul_dtype, None, 0)
    return found[:2]  # type: ignore[index]  # apply() is untyped


def encode_with_dead(
    x: Float[Tensor, "N D"],
    W_enc: Float[Tensor, "L D"],
    b_enc: Float[Tensor, " L"],
    k: int,
    activation: Activation,
    pre_bias: Float[Tensor, " D"] | None,
    matmul_dtype: torch.dtype | None,
    dead: Int[Tensor, " M"],
    k_dead: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Twin of `functional.encode_with_dead`: of one product both selections."""
    return _Encode.apply(  # type: ignore[return-value]  # apply() is untyped
        x, W_enc, b_enc, k, activation, pre_bias, matmul_dtype, dead, k_dead
    )


def decode(
    top_acts: Float[Tensor, "N K"], top_indices: Int[Tensor, "N K"], W_dec: Float[Tensor, "L D"]
) -> Float[Tensor, "N D"]:
    """Twin of `functional.decode`."""
    return _Decode.apply(top_acts, top_indices, W_dec)  # type: ignore[return-value]  # as above


def squared_error(y: Float[Tensor, "N D"], y_hat: Float[Tensor, "N D"]) -> Float[Tensor, ""]:
    """Twin of `functional.squared_error`; the gradient is of y_hat alone."""
    return _SquaredError.apply(y, y_hat)  # type: ignore[return-value]  # as above


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        k: int,
        activation: Activation,
        pre_bias: Tensor | None,
        matmul_dtype: torch.dtype | None,
        dead: Tensor | None,
        k_dead: int,
    ) -> tuple[Tensor, ...]:
        dtype = matmul_dtype or W_enc.dtype
        inputs = (x if pre_bias is None else x - pre_bias).to(dtype)
        W = W_enc
        if W.dtype != dtype:
            W = native.in_huge_pages(torch.empty_like(W_enc, dtype=dtype)).copy_(W_enc)
        widths = (k,) if dead is None else (k, k_dead)
        tops = [x.new_empty(len(x), width, dtype=W_enc.dtype) for width in widths]
        indices = [torch.empty(t.shape, dtype=torch.int64, device=x.device) for t in tops]
        select = _Selection(W, b_enc, activation, dead)
        buffer = native.in_huge_pages(inputs.new_empty(_chunk_rows(inputs, len(W)), len(W)))
        for start in range(0, len(x), len(buffer)):
            rows = slice(start, start + len(buffer))
            pre_acts = buffer[: len(inputs[rows])]
            select(inputs[rows], pre_acts, [t[rows] for t in tops], [i[rows] for i in indices])
        for top_acts in tops:
            torch.relu_(top_acts)
        ctx.save_for_backward(inputs, W_enc, *tops)
        ctx.indices = indices
        ctx.mark_non_differentiable(*indices)
        return tuple(t for pair in zip(tops, indices, strict=True) for t in pair)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs, W_enc, *tops = ctx.saved_tensors
        grad_x, grad_W, grad_b, _, _, grad_bias, *_ = ctx.needs_input_grad
        d_x = d_W = d_latents = None
        for top_acts, indices, grad_acts in zip(tops, ctx.indices, grads[::2], strict=True):
            grad = torch.where(top_acts > 0, grad_acts, 0).to(W_enc.dtype)
            by_latent = _ByLatent.of(indices, len(W_enc))
            sorted_grad = by_latent.sort(grad)
            if grad_b or grad_bias:
                d_latents = _add(d_latents, by_latent.sum(sorted_grad))
            if grad_x:
                d_x = _add(d_x, _weighted_rows(grad, indices, W_enc))
            if grad_W:
                d_W = _add(d_W, by_latent.sum_rows(sorted_grad, inputs).to(W_enc.dtype))
        # Gao et al., appendix D: sum the latents' gradients over rows, then multiply once.
        d_bias = -(d_latents @ W_enc) if d_latents is not None and grad_bias else None
        return d_x, d_W, d_latents if grad_b else None, None, None, d_bias, None, None, None


def _add(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total.add_(more)


class _Selection:
    """From rows of inputs to their active latents, and those among the dead where there are any."""

    def __init__(
        self, W: Tensor, b_enc: Tensor, activation: Activation, dead: Tensor | None
    ) -> None:
        self.W, self.activation, self.dead = W, activation, dead
        self.in_c = activation == "topk" and in_c(b_enc, table=W)
        # In C the bias is added while a row is looked at, in float32.
        self.bias = b_enc if self.in_c else b_enc.to(W.dtype)
        self.among: list[tuple[Tensor | None, Tensor]] = [(None, self.bias)]
        if dead is not None:
            self.among.append((dead.int(), self.bias[dead]))

    def __call__(
        self, inputs: Tensor, pre_acts: Tensor, tops: list[Tensor], indices: list[Tensor]
    ) -> None:
        """Write what is found for `inputs` into `tops` and `indices`; `pre_acts` is a buffer."""
        if self.in_c:
            torch.mm(inputs, self.W.t(), out=pre_acts)
            found = zip(self.among, tops, indices, strict=True)
            native.select_largest(pre_acts, *(native.Wanted(*a, t, i) for a, t, i in found))
            return
        torch.addmm(self.bias, inputs, self.W.t(), out=pre_acts)
        select = _top_k if self.activation == "topk" else _group_max
        values, columns = select(pre_acts, tops[0].shape[1])
        tops[0].copy_(values)
        indices[0].copy_(columns)
        if self.dead is not None:
            values, columns = _top_k(pre_acts.index_select(1, self.dead), tops[1].shape[1])
            tops[1].copy_(values)
            indices[1].copy_(self.dead[columns])


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, top_acts: Tensor, top_indices: Tensor, W_dec: Tensor) -> Tensor:
        ctx.save_for_backward(top_acts, W_dec)
        ctx.top_indices = top_indices
        # PyTorch's operators check what they index.
        if in_c(top_acts, W_dec) and not _within(top_indices, len(W_dec)):
            raise IndexError(f"top_indices must be at least 0 and below {len(W_dec)}")
        return _weighted_rows(top_acts, top_indices, W_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        top_acts, W_dec = ctx.saved_tensors
        grad_acts = grad_W = None
        if ctx.needs_input_grad[0]:
            grad_acts = _sampled_product(grad_out, W_dec, ctx.top_indices)
        if ctx.needs_input_grad[2]:
            by_latent = _ByLatent.of(ctx.top_indices, len(W_dec))
            grad_W = by_latent.sum_rows(by_latent.sort(top_acts), grad_out.contiguous())
        return grad_acts, None, grad_W


class _SquaredError(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, y_hat: Tensor) -> Tensor:
        difference = (y_hat - y).flatten()
        ctx.save_for_backward(difference)
        ctx.shape = y_hat.shape
        return torch.dot(difference, difference)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (difference,) = ctx.saved_tensors
        return None, difference.mul_(2 * grad).view(ctx.shape)  # its last use


def _within(indices: Tensor, limit: int) -> bool:
    return not indices.numel() or bool(indices.min() >= 0 and indices.max() < limit)


def _chunk_rows(inputs: Tensor, num_latents: int) -> int:
    rows = _CHUNK_ROWS
    if inputs.device.type != "cpu":
        rows = max(64, _CHUNK_ON_GPU // num_latents // 64 * 64)
    return max(1, min(len(inputs), rows))


def _top_k(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of every row, in no order, exactly.

    They lie in the k groups with the largest maxima: a group left out has k maxima, each in a group
    of its own, that are no smaller than anything in it.
    """
    n, width = values.shape
    groups = width // _GROUP
    if groups <= 2 * k:
        return values.topk(k, dim=1, sorted=False)
    # Group j holds the columns j, j + groups, j + 2 groups, ...: the maximum runs along memory.
    members = values[:, : groups * _GROUP].view(n, _GROUP, groups)
    _, chosen = _top_k(members.amax(1), k)  # [n K]
    candidates = members.gather(2, chosen.unsqueeze(1).expand(-1, _GROUP, -1)).flatten(1)
    rest = values[:, groups * _GROUP :]
    if rest.shape[1]:
        candidates = torch.cat([candidates, rest], dim=1)
    top, position = candidates.topk(k, dim=1, sorted=False)
    member = position.div(k, rounding_mode="floor")
    column = member * groups + chosen.gather(1, position - member * k)
    if rest.shape[1]:
        column = torch.where(member < _GROUP, column, position + (groups - k) * _GROUP)
    return top, column


def _group_max(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The largest entry of each of k runs of neighbouring columns."""
    n, width = values.shape
    top, within = values.view(n, k, width // k).max(dim=2)
    return top, within + torch.arange(k, device=values.device) * (width // k)


def _weighted_rows(weights: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """out_n = sum_j weights_nj table[indices_nj], [N D]."""
    if sums := _in_triton(table.device):
        return sums.weighted_rows(weights, indices, table)
    if in_c(weights, table):
        n, k = indices.shape
        starts = torch.arange(0, n * k + 1, k, dtype=torch.int32)
        return native.sum_rows(starts, indices.flatten().int(), weights.contiguous(), table)
    return F.embedding_bag(indices.int(), table, per_sample_weights=weights, mode="sum")


def _sampled_product(rows: Tensor, table: Tensor, indices: Tensor) -> Tensor:
    """out_nj = <rows_n, table[indices_nj]>, [N K]."""
    if sums := _in_triton(table.device):
        return sums.sampled_product(rows, table, indices)
    if in_c(rows, table):
        return native.sampled_product(rows.contiguous(), indices, table)
    n, k = indices.shape
    wide = torch.float32 if rows.dtype in (torch.bfloat16, torch.float16) else rows.dtype
    pattern = torch.sparse_csr_tensor(
        torch.arange(0, n * k + 1, k, device=rows.device),
        indices.flatten(),
        rows.new_zeros(n * k, dtype=wide),
        size=(n, len(table)),
        check_invariants=False,
    )
    product = torch.sparse.sampled_addmm(
        pattern, rows.contiguous().to(wide), table.to(wide).t(), beta=0.0
    )
    return product.values().view(n, k).to(rows.dtype)


class _ByLatent:
    """The entries of `top_indices` sorted by latent, the order in which gradients are summed."""

    # Encoder and decoder gradients of one forward share one sort.
    _sorted = WeakTensorKeyDictionary()

    def __init__(self, top_indices: Tensor, num_latents: int) -> None:
        if in_c() and top_indices.device.type == "cpu":
            found = native.sort_by_column(top_indices, num_latents)
            self.starts, self.order, self.rows = found
        else:
            flat = top_indices.flatten()
            narrow = torch.int16 if num_latents <= 2**15 else torch.int32  # sorts faster
            self.order = torch.sort(flat.to(narrow), stable=True).indices
            counts = torch.bincount(flat, minlength=num_latents)
            self.starts = F.pad(counts.cumsum(0), (1, 0)).int()
            self.rows = (self.order // top_indices.shape[1]).int()
        self.counts = self.starts.diff().long()

    @classmethod
    def of(cls, top_indices: Tensor, num_latents: int) -> "_ByLatent":
        found = cls._sorted.get(top_indices)
        if found is None or len(found.counts) != num_latents:
            found = cls._sorted[top_indices] = cls(top_indices, num_latents)
        return found

    def sort(self, values: Float[Tensor, "N K"]) -> Float[Tensor, " E"]:
        """The entries' values in that order."""
        if self.order.dtype == torch.int32 and in_c(values):
            return native.take(values.contiguous(), self.order)
        return values.flatten()[self.order]

    def sum(self, values: Float[Tensor, " E"]) -> Float[Tensor, " L"]:
        """out_l = sum of sorted values over the entries of latent l."""
        return torch.segment_reduce(values, "sum", lengths=self.counts, unsafe=True, initial=0)

    def sum_rows(
        self, weights: Float[Tensor, " E"], rows: Float[Tensor, "N D"]
    ) -> Float[Tensor, "L D"]:
        """out_l = sum of weights_e rows_{n(e)} over the sorted entries e of latent l."""
        if sums := _in_triton(rows.device):
            return sums.sum_by_latent(
                weights.to(rows.dtype), self.rows, self.starts, self.counts, rows
            )
        if in_c(weights, table=rows):
            return native.sum_rows(self.starts, self.rows, weights, rows)
        return F.embedding_bag(
            self.rows,
            rows,
            self.starts,
            per_sample_weights=weights.to(rows.dtype),
            mode="sum",
            include_last_offset=True,
        )
