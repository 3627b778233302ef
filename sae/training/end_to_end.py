"""End-to-end training: the LM's own loss, with all reconstructions spliced in."""

from functools import partial

import torch
from torch import Tensor

from ..batch import TokenBatch
from ..coders.bank import CoderBank
from ..config import TrainingConfig
from ..flag_checks import UsageError
from ..lm.capture import RowReader
from ..lm.head import check_head, cross_entropy, kl_divergence, last_hidden_state, predictions_made
from ..lm.splice import spliced
from .losses import auxiliary_loss
from .step_sums import StepSums


class EndToEnd:
    """The other branch of training: the LM's own loss, with all reconstructions spliced in.

    loss = L / positions + auxk_alpha auxk_loss + multi_topk_fvu / 8,   L summed over the step

    L is `ce`, the next-token cross-entropy, or `kl`, the divergence from the clean LM. AuxK and
    Multi-TopK keep their denominator, the variance of all rows of the step, which is known when
    they are in: their gradients are kept apart until then. They need the module's own output, so a
    transcoder's module runs if one of them is asked for, or tokens may be left out, which keep it:
    by flags, or where the data is `masked`.
    """

    def __init__(
        self, capture: RowReader, bank: CoderBank, cfg: TrainingConfig, masked: bool
    ) -> None:
        assert capture.lm is not None, "rows made elsewhere have no loss of an LM"
        self.lm, self.rule, self.bank, self.cfg = capture.lm, capture.rule, bank, cfg
        self.has_auxiliary_losses = bool(cfg.auxk_alpha or bank.multi_topk)
        """Whether there are losses beside the LM's own."""
        self.run_modules = masked or self.has_auxiliary_losses or not bank.transcode
        try:
            check_head(self.lm)
        except UsageError as error:
            raise UsageError(f"--loss_fn {cfg.loss_fn}: {error}; use fvu") from None

    def backward(
        self, tokens: TokenBatch, sums: StepSums, dead: dict[str, Tensor | None], k: dict[str, int]
    ) -> None:
        """One forward of the LM with all coders spliced in, and its gradients."""
        for name, coder in self.bank.items() if self.has_auxiliary_losses else ():
            sums.gradients_apart.setdefault(name, [torch.zeros_like(p) for p in coder.parameters()])
        seen: dict[str, int] = {}

        def reconstruct(name: str, x: Tensor, y: Tensor | None) -> Tensor:
            coder = self.bank[name]
            seen[self.bank.hookpoint[name]] = len(x)
            if y is not None and not coder.cfg.transcode:
                x = y
            # Of a module that did not run the target is unknown, and no error is asked for.
            target = x.new_zeros(len(x), coder.d_out) if y is None else y
            errors = coder.errors(x, target, dead[name], k[name])
            sums.add(name, errors)
            if y is not None:
                y = y.detach()
                x = x.detach() if coder.cfg.transcode else y
                sums.add_rows(self.bank.hookpoint[name], x, y)
            if self.has_auxiliary_losses:
                loss = auxiliary_loss(errors, self.cfg.auxk_alpha)
                if loss.requires_grad:
                    parameters = list(coder.parameters())
                    found = torch.autograd.grad(
                        loss, parameters, retain_graph=True, allow_unused=True
                    )
                    for apart, gradient in zip(sums.gradients_apart[name], found, strict=True):
                        apart += 0 if gradient is None else gradient
            return errors.sae_out

        clean = None
        if self.cfg.loss_fn == "kl":
            with torch.no_grad():
                clean = last_hidden_state(self.lm, tokens)
        replace = {name: partial(reconstruct, name) for name in self.bank.hookpoint}
        with spliced(self.lm, replace, tokens, self.rule, run_modules=self.run_modules):
            hidden = last_hidden_state(self.lm, tokens)
        sums.rows.update(seen)
        targets, read = predictions_made(tokens)
        if clean is None:
            loss, positions = cross_entropy(self.lm, hidden, tokens), targets
        else:
            loss, positions = kl_divergence(self.lm, hidden, clean, tokens), read
        loss.backward()
        found = torch.stack([loss.detach(), loss.new_full((), positions)]).double()
        sums.lm_loss = found if sums.lm_loss is None else sums.lm_loss + found

    @torch.no_grad()
    def combine_gradients_(self, sums: StepSums) -> None:
        """Put the gradients of the LM's loss and those kept apart together, of all ranks.

        What is left to do is what is done to those of FVU: to divide by the variance.
        """
        assert sums.lm_loss is not None, "backward() comes first"
        positions = sums.lm_loss[1]
        for name, coder in self.bank.items():
            scale = (sums.variance(name) / positions).to(coder.dtype)
            for i, parameter in enumerate(coder.parameters()):
                assert parameter.grad is not None, "gradients() comes first"
                parameter.grad *= scale
                if self.has_auxiliary_losses:
                    parameter.grad += sums.gradients_apart[name][i]
