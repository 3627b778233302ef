"""From rows of inputs to their active latents: searched in C, or selected in chunks."""

from types import ModuleType

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..config import INT8_CANDIDATES, Activation
from . import dense_products
from .backend import Backend
from .cpu import native

# Rows of pre_acts at a time: a CPU's product lays the weights out anew for every chunk.
_CHUNK_ROWS = 1024
_CHUNK_ON_GPU = 2**27  # elements that fill one
_GROUP = 8
_NUMBERS = 2**32 - 1


def active_latents(
    backend: Backend,
    inputs: Float[Tensor, "N D"],
    W_enc: Float[Tensor, "L D"],
    b_enc: Float[Tensor, " L"],
    activation: Activation,
    widths: tuple[int, ...],
    dead: Int[Tensor, " M"] | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Activations and indices of the `widths[0]` latents of `functional.encode`, in W_enc's dtype.

    With `dead` also those of the `widths[1]` largest among these; where `dense_products.pays`, as
    activations of all the dead (`dense_products.AllOf`), in the dtype of `inputs`, which is the
    precision of the product.
    """
    if widths[0] > len(W_enc):
        raise IndexError(f"k = {widths[0]} is more than the {len(W_enc)} latents")
    tops = [torch.empty(len(inputs), k, dtype=W_enc.dtype, device=W_enc.device) for k in widths]
    indices = [torch.empty(t.shape, dtype=torch.int64, device=t.device) for t in tops]
    if dead is not None and _are_dense(backend, inputs, widths[1], len(dead)):
        columns = dense_products.AllOf.padded(len(dead))
        tops[1], indices[1] = inputs.new_zeros(len(inputs), columns), dead
    arguments = (inputs, W_enc.contiguous(), b_enc)
    searched = activation == "topk" and backend.in_c(W_enc, b_enc, table=inputs)
    if searched and backend.in_int8:
        _search_in_int8(*arguments, tops, indices, dead)
    elif searched and native.searches(inputs.dtype):
        native.search(*arguments, inputs.dtype, tops, indices, dead)
    else:
        _by_chunks(backend, *arguments, activation, widths, tops, indices, dead)
    return tops, indices


def _search_in_int8(
    inputs: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    tops: list[Tensor],
    indices: list[Tensor],
    dead: Tensor | None,
) -> None:
    """Twin of `functional.encode_in_int8`; of the dead, those that rank highest are taken.

    What is found for a row does not depend on other rows; the last bits of its activations do.
    """

    def in_full(found: Tensor) -> Tensor:
        return native.sampled_product(rows, found, W_enc) + b_enc[found]

    rows, (n, k) = inputs.float(), tops[0].shape
    candidates = indices[0].new_empty(n, min(len(W_enc), INT8_CANDIDATES * k))
    rough = tops[0].new_empty(candidates.shape)
    found = [candidates, *indices[1:]]
    native.search(inputs, W_enc, b_enc, torch.int8, [rough, *tops[1:]], found, dead)
    columns, no_bias = torch.empty_like(indices[0]), b_enc.new_zeros(candidates.shape[1])
    native.select_largest(in_full(candidates), native.Wanted(None, no_bias, tops[0], columns))
    torch.gather(candidates, 1, columns, out=indices[0])
    for top, of_dead in zip(tops[1:], indices[1:], strict=True):
        top.copy_(in_full(of_dead).relu_())


def _by_chunks(
    backend: Backend,
    inputs: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    activation: Activation,
    widths: tuple[int, ...],
    tops: list[Tensor],
    indices: list[Tensor],
    dead: Tensor | None,
) -> None:
    W = W_enc
    if W.dtype != inputs.dtype:
        W = native.in_huge_pages(torch.empty_like(W_enc, dtype=inputs.dtype)).copy_(W_enc)
    select = _Selection(backend, W, b_enc, activation, widths, dead)
    buffer = native.in_huge_pages(inputs.new_empty(chunk_rows(inputs, len(W)), len(W)))
    for start in range(0, len(inputs), len(buffer)):
        rows = slice(start, start + len(buffer))
        pre_acts = buffer[: len(inputs[rows])]
        places = [i[rows] if i.ndim == 2 else i for i in indices]
        select(inputs[rows], pre_acts, [t[rows] for t in tops], places)
    for top_acts, places in zip(tops, indices, strict=True):
        if places.ndim == 2:  # what is dense has no negatives
            torch.relu_(top_acts)


class _Selection:
    """From rows of inputs to their active latents, and those among the dead where there are any."""

    def __init__(
        self,
        backend: Backend,
        W: Tensor,
        b_enc: Tensor,
        activation: Activation,
        widths: tuple[int, ...],
        dead: Tensor | None,
    ) -> None:
        self.W, self.activation, self.widths, self.dead = W, activation, widths, dead
        self.backend = backend
        self.triton = _triton(backend, W)
        self.in_c = activation == "topk" and backend.in_c(b_enc, table=W)
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
        if self.activation == "groupmax":
            values, columns = _group_max(pre_acts, self.widths[0])
            tops[0].copy_(values)
            indices[0].copy_(columns)
        else:
            self._write_top_k(pre_acts, tops[0], indices[0])
        if self.dead is None:
            return
        if indices[1].ndim == 1:
            tops[1][:, : len(self.dead)] = pre_acts.index_select(1, self.dead)
            if self.widths[1] < len(self.dead):
                keep_largest_(self.backend, tops[1], self.widths[1])
            else:
                torch.relu_(tops[1])
            return
        self._write_top_k(pre_acts.index_select(1, self.dead), tops[1], indices[1])
        indices[1].copy_(self.dead[indices[1]])

    def _write_top_k(self, values: Tensor, top: Tensor, columns: Tensor) -> None:
        if self.triton is not None:
            self.triton.largest(values, top.shape[1], top, columns)
            return
        found = _top_k(values, top.shape[1])
        top.copy_(found[0])
        columns.copy_(found[1])


def _are_dense(backend: Backend, inputs: Tensor, k: int, latents: int) -> bool:
    if backend.dense is not None:
        return backend.dense
    return dense_products.pays(backend, inputs, inputs.dtype, k, latents)


def largest_columns(backend: Backend, values: Float[Tensor, "N W"], k: int) -> Int[Tensor, "N K"]:
    """Twin of `functional.largest_columns`, of values of at least 0."""
    shape = len(values), k
    top, columns = values.new_empty(shape), values.new_empty(shape, dtype=torch.int64)
    if backend.in_c(values):
        no_bias = values.new_zeros(values.shape[1])
        native.select_largest(values, native.Wanted(None, no_bias, top, columns))
    elif triton := _triton(backend, values):
        triton.largest(values, k, top, columns)
    else:
        columns = values.topk(k, dim=1, sorted=False).indices
    return columns


def keep_largest_(backend: Backend, values: Float[Tensor, "N W"], k: int) -> None:
    """Set all but the k largest entries of every row, and those below 0, to 0."""
    triton = _triton(backend, values)
    assert triton is not None, "dense products pay where there is Triton"
    triton.keep_largest_(values, k)


def _triton(backend: Backend, W: Tensor) -> ModuleType | None:
    if not backend.in_triton(W.device):
        return None
    from .cuda import selection  # there is no Triton where there is no GPU

    return selection if W.dtype in selection.DTYPES else None


def chunk_rows(inputs: Tensor, num_latents: int) -> int:
    """Rows whose pre_acts are made at a time."""
    rows = _CHUNK_ROWS
    if inputs.device.type != "cpu":
        rows = max(64, _CHUNK_ON_GPU // num_latents // 64 * 64)
    return max(1, min(len(inputs), rows))


def _top_k(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of every row, in no order; on a CPU, of equal ones the first."""
    top, columns = _largest(values, k)
    if values.device.type != "cpu":  # it would be asked whether there are any; Triton is exact
        return top, columns
    least = top.amin(1, keepdim=True)
    left_out = (values == least).sum(1) > (top == least).sum(1)
    rows = torch.from_numpy(left_out.numpy().nonzero()[0])
    if len(rows):  # they have entries that equal some that were taken
        columns[rows] = _first_of_equal(values[rows], k)
        top[rows] = values[rows].gather(1, columns[rows])
    return top, columns


def _first_of_equal(values: Tensor, k: int) -> Int[Tensor, "N K"]:
    if values.dtype == torch.float64:  # whose bits leave no room for a number
        return values.sort(dim=1, descending=True, stable=True).indices[:, :k]
    bits = (values.float() + 0.0).view(torch.int32)  # -0 is 0
    keys = (bits ^ ((bits >> 31) & (2**31 - 1))).long() << 32  # in the order of the values
    keys |= _NUMBERS - torch.arange(values.shape[1], device=values.device)
    return _NUMBERS - (keys.topk(k, dim=1, sorted=False).values & _NUMBERS)


def _largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of every row, in no order; of equal ones any.

    They lie in the k groups with the largest maxima: a group left out has k maxima, each in a group
    of its own, that are no smaller than anything in it.
    """
    n, width = values.shape
    groups = width // _GROUP
    if groups <= 2 * k:
        return values.topk(k, dim=1, sorted=False)
    # Group j holds the columns j, j + groups, j + 2 groups, ...: the maximum runs along memory.
    members = values[:, : groups * _GROUP].view(n, _GROUP, groups)
    _, chosen = _largest(members.amax(1), k)  # [n K]
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
