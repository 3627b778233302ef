"""The mathematics of sparse coders as pure functions of tensors: the specification.

Everything here is written to be read and differentiated, not to be fast; `kernels/twins.py` holds
the twins that training runs, with the same signatures, and the tests hold the two against each
other.

Shapes, here and in the whole package: B sequences, S positions, N rows a coder sees, D d_in (d_out
for what is reconstructed), L num_latents, K active latents per row, H hookpoints.

"Gao et al." is "Scaling and evaluating sparse autoencoders" (arXiv 2406.04093).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..config import INT8_CANDIDATES, Activation


class Latents(NamedTuple):
    """The active latents of every row, in no order; shorter rows end in zeros of latent 0."""

    acts: Float[Tensor, "N K"]
    indices: Int[Tensor, "N K"]


def encode(
    x: Float[Tensor, "N D"],
    W_enc: Float[Tensor, "L D"],
    b_enc: Float[Tensor, " L"],
    k: int,
    activation: Activation = "topk",
    pre_bias: Float[Tensor, " D"] | None = None,
    matmul_dtype: torch.dtype | None = None,
) -> Latents:
    """The k active latents of every row.

    pre_acts = (x - pre_bias) W_enc^T + b_enc;  acts = relu(select_k(pre_acts))

    `topk` selects the k largest of a row, `groupmax` the largest of each of k runs of L / k
    neighbouring latents. Where fewer than k pre_acts are positive the rest of the activations are
    0: such a latent is not active and gets no gradient. `matmul_dtype` is the precision of the
    product's factors; it is summed, and the bias is added, in that or a higher one.

    Source: Gao et al., section 2.3 (TopK).
    """
    pre_acts = _pre_acts(x, W_enc, b_enc, pre_bias, matmul_dtype)
    if activation == "topk":
        top_acts, top_indices = pre_acts.topk(k, dim=1, sorted=False)
    else:
        top_acts, within = pre_acts.unflatten(1, (k, -1)).max(dim=2)
        starts = torch.arange(k, device=x.device) * (pre_acts.shape[1] // k)
        top_indices = within + starts
    return Latents(top_acts.relu().to(W_enc.dtype), top_indices)


def _pre_acts(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    pre_bias: Tensor | None,
    matmul_dtype: torch.dtype | None,
) -> Float[Tensor, "N L"]:
    inputs = x if pre_bias is None else x - pre_bias
    dtype = matmul_dtype or inputs.dtype
    return F.linear(inputs.to(dtype), W_enc.to(dtype), b_enc.to(dtype))


def encode_above(
    x: Float[Tensor, "N D"],
    W_enc: Float[Tensor, "L D"],
    b_enc: Float[Tensor, " L"],
    threshold: Float[Tensor, " L"],
    pre_bias: Float[Tensor, " D"] | None = None,
    matmul_dtype: torch.dtype | None = None,
) -> Latents:
    """The latents of every row that are above their thresholds.

    pre_acts as of `encode`;  acts = relu(pre_acts) 1[pre_acts > threshold]

    The threshold gets no gradient here.

    Source: Rajamanoharan et al., "Jumping Ahead" (arXiv 2407.14435), equations 3 and 4.
    """
    pre_acts = _pre_acts(x, W_enc, b_enc, pre_bias, matmul_dtype)
    return _in_rows(pre_acts, (pre_acts > threshold) & (pre_acts > 0), W_enc.dtype)


def encode_jumping(
    x: Float[Tensor, "N D"],
    W_enc: Float[Tensor, "L D"],
    b_enc: Float[Tensor, " L"],
    threshold: Float[Tensor, " L"],
    bandwidth: float,
    most: int,
    pre_bias: Float[Tensor, " D"] | None = None,
    matmul_dtype: torch.dtype | None = None,
    dead: Int[Tensor, " M"] | None = None,
    k_dead: int = 0,
) -> tuple[Latents, Latents | None, Int[Tensor, " L"]]:
    """`encode_above` with a gradient for thresholds; AuxK's as of `encode`; and counts.

    acts = pre_acts 1[pre_acts > threshold];   near = 1[|pre_acts - threshold| < bandwidth / 2]
    d acts / d threshold = -threshold / bandwidth near

    The step function has the slope of a ramp as wide as the bandwidth, for thresholds alone. The
    counts are of the rows near the threshold of each latent. What is near it and not above is among
    the latents with an activation of 0. Of a row with more than `most` of them those stay that are
    farthest above, of equal ones the first.

    Source: Rajamanoharan et al., "Jumping Ahead" (arXiv 2407.14435).
    """
    pre_acts = _pre_acts(x, W_enc, b_enc, pre_bias, matmul_dtype)
    above = pre_acts - threshold.detach()
    near = above.abs() < bandwidth / 2
    active = (above > 0) & (pre_acts > 0)
    ramp = ((pre_acts.detach() - threshold) / bandwidth + 0.5).clamp(0, 1)
    acts = torch.where(active, pre_acts, 0) + threshold.detach() * (ramp - ramp.detach())
    order = above.argsort(dim=1, descending=True, stable=True)[:, :most]
    kept = torch.zeros_like(near).scatter(1, order, True) & (above > -bandwidth / 2)
    latents, counts = _in_rows(acts, kept, W_enc.dtype), near.sum(0)
    if dead is None:
        return latents, None, counts
    of_dead = _largest_dead(x, W_enc, b_enc, pre_bias, matmul_dtype, dead, k_dead)
    return latents, of_dead, counts


def l0_gradient(
    near: Int[Tensor, " L"], fired: Int[Tensor, " L"], rows: int, target: float, bandwidth: float
) -> Float[Tensor, " L"]:
    """The gradient by thresholds of (L0 / target - 1)^2, L0 being the mean over `rows` rows.

    d L0 / d threshold = -near / (rows bandwidth);   L0 = sum fired / rows

    `near` and `fired` are counts of rows by latent, of which the first are those near the
    threshold. Source: Rajamanoharan et al.; a penalty of this form is that of
    dictionary_learning's trainer of such coders.
    """
    excess = fired.sum() / (rows * target) - 1
    return near * (-2 / (target * rows * bandwidth)) * excess


def _in_rows(
    pre_acts: Float[Tensor, "N L"], active: Bool[Tensor, "N L"], dtype: torch.dtype
) -> Latents:
    longest = int(active.sum(1).amax()) if len(active) else 0
    order = active.int().argsort(dim=1, descending=True, stable=True)[:, :longest]
    kept = active.gather(1, order)
    top_acts = torch.where(kept, pre_acts.gather(1, order), 0)
    return Latents(top_acts.to(dtype), order * kept)


def encode_in_groups(
    x: Float[Tensor, "N D"],
    W_enc: Float[Tensor, "L D"],
    b_enc: Float[Tensor, " L"],
    k: int,
    groups: list[int],
    pre_bias: Float[Tensor, " D"] | None = None,
    matmul_dtype: torch.dtype | None = None,
    dead: Int[Tensor, " M"] | None = None,
    k_dead: int = 0,
) -> tuple[Latents, Latents | None]:
    """The k B largest latents of every group of B neighbouring rows, and AuxK's as of `encode`.

    pre_acts as of `encode`;  acts = relu(the k B largest of B x L)

    `groups` are their rows B, N in all. Of equal ones the first row's come first, then those of
    lower number.

    Source: Bussmann et al., "BatchTopK Sparse Autoencoders" (arXiv 2412.06410), section 3.
    """
    pre_acts = _pre_acts(x, W_enc, b_enc, pre_bias, matmul_dtype)
    active = torch.zeros_like(pre_acts, dtype=torch.bool)
    for rows, chosen in zip(pre_acts.split(groups), active.split(groups), strict=True):
        order = rows.flatten().argsort(dim=0, descending=True, stable=True)
        chosen.view(-1)[order[: k * len(rows)]] = True
    latents = _in_rows(pre_acts, active & (pre_acts > 0), W_enc.dtype)
    if dead is None:
        return latents, None
    return latents, _largest_dead(x, W_enc, b_enc, pre_bias, matmul_dtype, dead, k_dead)


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
) -> tuple[Latents, Latents]:
    """`encode`, and then the `k_dead` largest among the latents numbered by `dead`, both as there.

    Source: Gao et al., appendix A.2 (AuxK).
    """
    latents = encode(x, W_enc, b_enc, k, activation, pre_bias, matmul_dtype)
    return latents, _largest_dead(x, W_enc, b_enc, pre_bias, matmul_dtype, dead, k_dead)


def _largest_dead(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    pre_bias: Tensor | None,
    matmul_dtype: torch.dtype | None,
    dead: Tensor,
    k_dead: int,
) -> Latents:
    found = encode(x, W_enc[dead], b_enc[dead], k_dead, "topk", pre_bias, matmul_dtype)
    return Latents(found.acts, dead[found.indices])


def encode_in_int8(
    x: Float[Tensor, "N D"],
    W_enc: Float[Tensor, "L D"],
    b_enc: Float[Tensor, " L"],
    k: int,
    pre_bias: Float[Tensor, " D"] | None = None,
    candidates: int = INT8_CANDIDATES,
) -> Latents:
    """`encode` by topk of only the `candidates` k latents that rank highest in int8.

    rough_nl = round(x_n / s_n) round(W_enc_l / s_l) s_n s_l + b_enc_l,   s = max |.| / 127 by rows

    Of these the pre-activations are computed in full, so what is found has its exact activation;
    what ranks too low in int8 is missed.
    """
    inputs = x if pre_bias is None else x - pre_bias

    def in_steps(rows: Tensor) -> tuple[Tensor, Tensor]:
        largest = rows.abs().amax(1, keepdim=True)
        # A true division: a number over a tensor is a multiplication to PyTorch.
        steps = torch.where(largest < 1e-30, 1.0, largest.new_tensor(127.0) / largest)
        return (rows * steps).round(), 1 / steps

    (whole_x, unit_x), (whole_W, unit_W) = in_steps(inputs), in_steps(W_enc)
    rough = (whole_x @ whole_W.T) * (unit_x * unit_W.T) + b_enc  # [N L], sums are whole numbers
    found = rough.topk(min(len(W_enc), candidates * k), dim=1).indices
    pre_acts = torch.einsum("nd,ncd->nc", inputs, W_enc[found]) + b_enc[found]
    top_acts, columns = pre_acts.topk(k, dim=1, sorted=False)
    return Latents(top_acts.relu(), found.gather(1, columns))


def largest_columns(values: Float[Tensor, "N W"], k: int) -> Int[Tensor, "N K"]:
    """Where in every row of `values` its k largest are, in no order."""
    return values.topk(k, dim=1).indices


def decode(latents: Latents, W_dec: Float[Tensor, "L D"]) -> Float[Tensor, "N D"]:
    """Sum the active latents' decoder rows: out_n = sum_j acts_nj W_dec[indices_nj]."""
    return torch.einsum("nk,nkd->nd", latents.acts, W_dec[latents.indices])


def squared_error(y: Float[Tensor, "N D"], y_hat: Float[Tensor, "N D"]) -> Float[Tensor, ""]:
    """sum ||y - y_hat||^2 over all rows, a function of y_hat: the target gets no gradient.

    Of half-precision rows in float32, since the sum would not fit into their own kind.
    """
    difference = y.detach() - y_hat
    return difference.to(torch.promote_types(difference.dtype, torch.float32)).pow(2).sum()


class Reconstruction(NamedTuple):
    """What `reconstruct` returns."""

    sae_out: Float[Tensor, "N D"]
    squared_error: Float[Tensor, ""]
    """sum ||y - sae_out||^2."""
    dead_error: Float[Tensor, ""] | None
    """sum ||e - e_hat||^2, where dead latents are given."""
    prefix_errors: Float[Tensor, " M"] | None = None
    """sum ||y - sae_out_m||^2 of the M prefixes, where there are any."""


def reconstruct(
    latents: Latents,
    W_dec: Float[Tensor, "L D"],
    offset: Float[Tensor, "*N D"],
    y: Float[Tensor, "N D"],
    dead_latents: Latents | None = None,
    prefixes: tuple[int, ...] = (),
    alone: bool = False,
) -> Reconstruction:
    """sae_out = decode(latents) + offset beside y, and AuxK's reconstruction of what is missing.

    e = y - sae_out, which gets no gradient here, and e_hat = decode(dead_latents); `alone`: as in
    `error_alone`. Of each m of `prefixes`, sae_out_m is the reconstruction from the active ones of
    the first m latents.

    Source: Gao et al., appendix A.2 (AuxK); Bussmann et al., "Learning Multi-Level Features with
    Matryoshka Sparse Autoencoders" (arXiv 2503.17547; prefixes).
    """
    sae_out = decode(latents, W_dec) + offset
    error, dead_error, prefix_errors = squared_error(y, sae_out), None, None
    if dead_latents is not None:
        kind = error_alone if alone else error_together
        dead_error = kind(y - sae_out, dead_latents, W_dec)
    if prefixes:
        outs = [decode(of_prefix(latents, m), W_dec) + offset for m in prefixes]
        prefix_errors = torch.stack([squared_error(y, out) for out in outs])
    return Reconstruction(sae_out, error, dead_error, prefix_errors)


def error_together(
    e: Float[Tensor, "N D"], latents: Latents, W_dec: Float[Tensor, "L D"]
) -> Float[Tensor, ""]:
    """sum_n ||e_n - e_hat_n||^2, e_hat = decode(latents)."""
    return squared_error(e, decode(latents, W_dec))


def error_alone(
    e: Float[Tensor, "N D"], latents: Latents, W_dec: Float[Tensor, "L D"]
) -> Float[Tensor, ""]:
    """sum_n ||e_n||^2 - sum_nj (||e_n||^2 - ||e_n - acts_nj W_dec_j||^2).

    What each of the latents alone explains of e, taken from it: below 0 where they overlap.
    """
    e, rows = e.detach(), W_dec[latents.indices]
    gains = 2 * latents.acts * (rows * e.unsqueeze(1)).sum(2)
    gains = gains - latents.acts.square() * rows.square().sum(2)
    return squared_error(e, torch.zeros_like(e)) - gains.sum()


def of_prefix(latents: Latents, m: int) -> Latents:
    """The active latents with all but the first m of the coder's at 0."""
    return Latents(latents.acts * (latents.indices < m), latents.indices)


def linear(
    x: Float[Tensor, "N D"], W: Float[Tensor, "D_out D"], matmul_dtype: torch.dtype | None = None
) -> Float[Tensor, "N D_out"]:
    """x W^T; `matmul_dtype` may be the precision of the factors, sums are of x's."""
    return x @ W.mT


def k_dead(d_out: int, dead: Int[Tensor, " M"] | None) -> int:
    """How many of the `dead` latents AuxK takes of a row: k_aux, or all where they are fewer."""
    return 0 if dead is None else min(k_aux(d_out), len(dead))


def k_aux(d_out: int) -> int:
    """Dead latents that AuxK lets take part: d_out / 2, the reference's heuristic."""
    return max(1, d_out // 2)


def scale_and_project_(
    grad: Tensor, scale: Tensor, unit_rows: Float[Tensor, "R D"] | None = None
) -> Tensor:
    """grad *= scale, and g -= (g . w) w by rows w of `unit_rows`, if given; return ||grad||^2.

    The part of a gradient along a row of unit norm is what normalizing the row would undo.
    """
    grad.mul_(scale)
    if unit_rows is not None:
        grad.sub_((grad * unit_rows).sum(1, keepdim=True) * unit_rows)
    return grad.square().sum()


def signum_step_(
    y: Tensor, z: Tensor, grad: Tensor, lr: float, beta: float, c: float, unit_norm: bool = False
) -> None:
    """z' = z - lr sign(g), y' = (1 - c)(y - (1 - beta) z) + (1 - beta + beta c) z'.

    Then every row of y' gets unit norm, if `unit_norm`. Source: see `ScheduleFreeSignum`.
    """
    moved = z - lr * grad.sign()
    y.copy_((1 - c) * (y - (1 - beta) * z) + (1 - beta + beta * c) * moved)
    z.copy_(moved)
    if unit_norm:
        normalize_rows_(y)


def normalize_rows_(rows: Float[Tensor, "R D"]) -> None:
    """Scale every row to unit norm; rows of zeros stay."""
    norm = rows.norm(dim=1, keepdim=True)
    rows.div_(norm.where(norm > 0, 1))
