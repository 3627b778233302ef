"""BatchTopK: the k B largest latents of B rows are active; in use, those above a threshold."""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...config import TrainingConfig
from ...flag_checks import UsageError, refuse
from ...kernels.entries import Entries
from ...kernels.twins import Latents
from ..functional import k_aux
from .family import Family
from .jumprelu import JumpReLU

if TYPE_CHECKING:
    from ..sparse_coder import SparseCoder

_KEPT = 0.9  # at .99, which others take, half of the first step would be left after 69 steps


class BatchTopK(JumpReLU):
    """acts = relu(the k B largest pre_acts of B rows) in training, and of JumpReLU in use.

    threshold' = .9 threshold + .1 (mean over the step's groups of the smallest positive act)

    B rows are those of whole sequences, so that they are the same in every placement.

    Source: Bussmann et al., "BatchTopK Sparse Autoencoders" (arXiv 2412.06410), section 3.
    """

    candidates = 4
    whole_sequences = True

    def check_flags(self, cfg: Any) -> None:
        """Raise UsageError for what makes sequences of uneven lengths, or has no sequences."""
        Family.check_flags(self, cfg)
        uneven = [(cfg.model, "exclude_tokens"), (cfg.model, "exclude_norm")]
        uneven += [(cfg.data, "chat_roles")]
        for group, flag in uneven:
            if getattr(group, flag):
                refuse(group, flag, "--activation batchtopk needs sequences of as many rows each")
        if not cfg.data.pack:
            raise UsageError("--no-pack: --activation batchtopk needs sequences of as many rows")
        if cfg.coder.multi_topk:
            refuse(cfg.coder, "multi_topk", "--activation batchtopk has no 4k latents: drop it")
        if cfg.training.steps_per_batch not in (None, 1):
            why = "--activation batchtopk selects among whole sequences: leave it out"
            refuse(cfg.training, "steps_per_batch", why)
        if cfg.training.uses_lm_loss:
            refuse(cfg.training, "loss_fn", "--activation batchtopk is trained on fvu")
        if cfg.training.batch_size % cfg.training.group_sequences:
            refuse(
                cfg.training,
                "group_sequences",
                f"must divide --batch_size {cfg.training.batch_size}",
            )

    def encode(
        self,
        coder: "SparseCoder",
        rows: Tensor,
        k: int,
        dead: Tensor | None = None,
        group: int | None = None,
    ) -> tuple[Latents, Latents | None]:
        """The k B largest of groups of rows, and AuxK's; without a group those above threshold."""
        if group is None:
            return super().encode(coder, rows, k)
        encoder, k_dead = coder.encoder, 0
        if dead is not None:
            k_dead = min(k_aux(coder.d_out), len(dead))
        arguments = (rows, encoder.weight, encoder.bias, k, group, coder.pre_bias)
        return coder.kernels.encode_in_groups(*arguments, coder.matmul_dtype, dead, k_dead)

    def group(self, cfg: TrainingConfig, rows: int, sequences: int) -> int | None:
        """The rows of `--group_sequences` sequences. Raises UsageError for uneven sequences."""
        if rows % sequences:
            raise UsageError(
                f"--activation batchtopk: {sequences} sequences gave {rows} rows: it needs as many "
                f"of each; give data without masks or padding"
            )
        return max(1, rows // sequences * cfg.group_sequences)

    def levels(self, latents: Latents, rows: int, group: int | None) -> Tensor | None:
        """The sum over groups of the smallest positive activation, and the number of groups."""
        if group is None or not rows:
            return None
        acts, order = latents.acts.detach().double(), latents.by_latent
        if isinstance(order, Entries):
            bounds = torch.arange(0, rows + group, group, device=acts.device).clamp(max=rows)
            parts = acts.split(order.starts[bounds].diff().tolist())
        else:
            parts = acts.split(group)
        smallest = [part[part > 0].amin() for part in parts if (part > 0).any()]
        if not smallest:
            return acts.new_zeros(2)
        return torch.stack([torch.stack(smallest).sum(), acts.new_tensor(len(smallest))])

    def update_threshold_(self, coder: "SparseCoder", levels: Tensor | None) -> None:
        """Move the threshold towards the mean of the step; the first step sets it."""
        total, groups = levels.tolist() if levels is not None else (0.0, 0.0)
        if groups:
            known, mean = coder.level, total / groups
            coder.level = mean if math.isinf(known) else _KEPT * known + (1 - _KEPT) * mean
            coder.threshold.fill_(coder.level)


FAMILY = BatchTopK()
