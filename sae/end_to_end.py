"""The LM with reconstructions in place of activations, and what becomes of its predictions.

Logits are never whole: the head runs on chunks of positions, and is run again in the backward.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from .bank import CoderBank
from .config import UsageError
from .exchange import Exchange
from .hookpoints import first_tensor
from .sums import StepSums

_OUTPUTS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_BODIES: WeakKeyDictionary[nn.Module, tuple[nn.Module, Any]] = WeakKeyDictionary()
_LOGITS = 1 << 26  # elements of a chunk of logits: 256 MiB in float32

Replacement = Callable[[Float[Tensor, "N D"], Float[Tensor, "N D_out"] | None], Tensor]
"""(input rows, output rows or None) of a hookpoint -> rows to go on with."""


@contextmanager
def spliced(
    lm: PreTrainedModel,
    replace: dict[str, Replacement],
    tokens: Int[Tensor, "B S"],
    exclude_tokens: tuple[int, ...] = (),
    *,
    run_modules: bool = True,
) -> Iterator[None]:
    """Inside, the LM reads `tokens` with the output of every named module replaced.

    Rows of excluded tokens stay what they are. Without `run_modules` a module does not run at all
    and gets no output rows, unless excluded tokens need them. Afterwards the LM is whole again.
    """
    kept = ~torch.isin(tokens, tokens.new_tensor(exclude_tokens)) if exclude_tokens else None
    if kept is not None and bool(kept.all()):
        kept = None
    modules = dict(lm.base_model.named_modules())
    with ExitStack() as stack:
        for name, function in replace.items():
            module = modules[name]
            whole = _whole_output(lm, module, tokens) if not run_modules and kept is None else None
            stack.enter_context(_forward(module, _replaced(module, function, kept, whole)))
        yield


def _replaced(
    module: nn.Module, function: Replacement, kept: Tensor | None, whole: Any
) -> Callable[..., Any]:
    """A forward of `module` with its output replaced; `whole` is a sample where it need not run."""
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs) if whole is None else whole
        y = first_tensor(output)
        x = first_tensor((args, kwargs))
        assert y is not None, "a hookpoint returns a tensor"
        rows = None if whole is not None else y.reshape(-1, y.shape[-1])
        x_rows = rows if x is None else x.reshape(-1, x.shape[-1])
        assert x_rows is not None, "a module that does not run has an input"
        shape = (*(y if x is None else x).shape[:-1], y.shape[-1])
        if kept is None:
            out = function(x_rows, rows).to(y.dtype)
        else:
            assert rows is not None
            mask = kept.flatten()
            out = rows.masked_scatter(
                mask.unsqueeze(1), function(x_rows[mask], rows[mask]).to(y.dtype)
            )
        return _with_first_tensor(output, out.view(shape))

    return forward


@contextmanager
def _forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, the module computes `forward`."""
    module.forward = forward  # type: ignore[method-assign]  # for one call
    try:
        yield
    finally:
        del module.forward


def _whole_output(lm: PreTrainedModel, module: nn.Module, tokens: Tensor) -> Any:
    """What a module returns, for its structure: a tensor alone, or among others."""
    if module not in _OUTPUTS:
        seen: list[Any] = []
        handle = module.register_forward_hook(lambda m, a, output: seen.append(output))
        with torch.no_grad():
            lm.base_model(input_ids=tokens[:1, :2])
        handle.remove()
        _OUTPUTS[module] = seen[0]
    return _OUTPUTS[module]


def _with_first_tensor(output: Any, tensor: Tensor) -> Any:
    if isinstance(output, Tensor):
        return tensor
    if isinstance(output, dict):
        first = next(key for key, value in output.items() if isinstance(value, Tensor))
        output[first] = tensor
        return output
    first = next(i for i, value in enumerate(output) if isinstance(value, Tensor))
    return type(output)((*output[:first], tensor, *output[first + 1 :]))


def last_hidden_state(lm: PreTrainedModel, tokens: Int[Tensor, "B S"]) -> Float[Tensor, "B S D"]:
    """What the LM's head reads."""
    return lm.base_model(input_ids=tokens).last_hidden_state


def cross_entropy(
    lm: PreTrainedModel, hidden: Float[Tensor, "B S D"], tokens: Int[Tensor, "B S"]
) -> Float[Tensor, ""]:
    """Sum over positions of -log p(next token); the last position of a sequence predicts none."""

    def loss(rows: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits(lm, rows), targets, reduction="sum")

    return _over_chunks(lm, loss, hidden[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def kl_divergence(
    lm: PreTrainedModel, hidden: Float[Tensor, "B S D"], clean: Float[Tensor, "B S D"]
) -> Float[Tensor, ""]:
    """Sum over positions of KL(p_clean || p) = sum_v p_clean (log p_clean - log p), 0 if equal."""

    def loss(rows: Tensor, clean_rows: Tensor) -> Tensor:
        with torch.no_grad():
            expected = logits(lm, clean_rows).log_softmax(1)
        log_p = logits(lm, rows).log_softmax(1)
        return F.kl_div(log_p, expected, reduction="sum", log_target=True)

    return _over_chunks(lm, loss, hidden.flatten(0, 1), clean.detach().flatten(0, 1))


def agreement(
    lm: PreTrainedModel, hidden: Float[Tensor, "B S D"], clean: Float[Tensor, "B S D"]
) -> Int[Tensor, ""]:
    """Positions at which the most likely next token is the clean LM's."""

    def equal(rows: Tensor, clean_rows: Tensor) -> Tensor:
        return (logits(lm, rows).argmax(1) == logits(lm, clean_rows).argmax(1)).sum()

    return _over_chunks(lm, equal, hidden.flatten(0, 1), clean.flatten(0, 1))


def _over_chunks(
    lm: PreTrainedModel, function: Callable[..., Tensor], rows: Tensor, others: Tensor
) -> Tensor:
    """The sum of a function over chunks of positions; no chunk's logits outlive it."""
    head: Any = lm.get_output_embeddings()
    size = max(1, _LOGITS // head.out_features)
    parts = zip(rows.split(size), others.split(size), strict=True)
    found = [checkpoint(function, *part, use_reentrant=False) for part in parts]
    return torch.stack(found).sum()


def logits(lm: PreTrainedModel, rows: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
    """The LM's own head on final hidden states, with whatever scaling or capping it does."""
    body, sample = check_head(lm)
    output = _with_first_tensor(copy.copy(sample), rows.unsqueeze(0))
    ids = torch.zeros(1, len(rows), dtype=torch.int64, device=rows.device)
    with _forward(body, lambda *_, **__: output):
        return lm(input_ids=ids).logits.squeeze(0).float()


def check_head(lm: PreTrainedModel) -> tuple[nn.Module, Any]:
    """The module below the head, which is not `base_model` in every LM, and what it returns.

    Raises UsageError where the head does not read what `last_hidden_state` gives.
    """
    if lm in _BODIES:
        return _BODIES[lm]
    seen: list[tuple[nn.Module, Any]] = []
    read: list[Tensor] = []
    head: Any = lm.get_output_embeddings()
    tokens = torch.arange(4, device=lm.device).unsqueeze(0)
    with ExitStack() as hooks, torch.no_grad():
        for module in lm.modules():
            handle = module.register_forward_hook(lambda m, a, output: seen.append((m, output)))
            hooks.callback(handle.remove)
        hooks.callback(head.register_forward_pre_hook(lambda m, a: read.append(a[0])).remove)
        expected = lm(input_ids=tokens).logits
    for module, output in reversed(seen):  # from the outside in, the LM itself first
        found = first_tensor(output)
        if module is lm or found is None or isinstance(output, Tensor):
            continue
        if found.data_ptr() == read[0].data_ptr() or torch.equal(found, read[0]):
            _BODIES[lm] = (module, output)
            with torch.no_grad():
                ours = logits(lm, last_hidden_state(lm, tokens)[0])
            if torch.allclose(ours, expected[0].float(), rtol=1e-3, atol=1e-3):
                return _BODIES[lm]
            del _BODIES[lm]
            break
    raise UsageError(
        f"MODEL: the head of {type(lm).__name__} cannot be run on hidden states alone, so nothing "
        f"can be said of its predictions: use --loss_fn fvu without --eval_every"
    )


class EndToEnd:
    """The other branch of training: the LM's own loss, with all reconstructions spliced in.

    loss = L / positions + auxk_alpha auxk_loss + multi_topk_fvu / 8,   L summed over the step

    L is `ce`, the next-token cross-entropy, or `kl`, the divergence from the clean LM. AuxK and
    Multi-TopK keep their denominator, the variance of all rows of the step, which is known when
    they are in: their gradients are kept apart until then. They need the module's own output, so a
    transcoder's module runs if one of them is asked for, and only then.
    """

    def __init__(self, lm: PreTrainedModel, bank: CoderBank, flags: Any) -> None:
        """`flags` is the script's `TrainConfig`."""
        self.lm, self.bank, self.loss_fn = lm, bank, flags.loss_fn
        self.exclude_tokens, self.auxk_alpha = flags.exclude_tokens, flags.auxk_alpha
        self.local = bool(flags.auxk_alpha or flags.multi_topk)
        self.run_modules = self.local or not bank.transcode
        self._device = next(bank.parameters()).device
        check_head(lm)
        self._start_step()

    def _start_step(self) -> None:
        # The loss, and the positions that it is summed over.
        self._total = torch.zeros(2, dtype=torch.float64, device=self._device)
        self._apart: dict[str, list[Tensor]] = {}
        for name, coder in self.bank.items() if self.local else ():
            self._apart[name] = [torch.zeros_like(p) for p in coder.parameters()]

    def backward(
        self,
        tokens: Int[Tensor, "B S"],
        sums: StepSums,
        dead: dict[str, Tensor | None],
        k: dict[str, int],
    ) -> None:
        """One forward of the LM with all coders spliced in, and its gradients."""
        seen: list[int] = []

        def reconstruct(name: str, x: Tensor, y: Tensor | None) -> Tensor:
            coder = self.bank[name]
            seen.append(len(x))
            if y is not None and not coder.cfg.transcode:
                x = y
            # Of a module that did not run the target is unknown, and no error is asked for.
            target = x.new_zeros(len(x), coder.d_out) if y is None else y
            out = coder(x, target, dead[name], total_variance=1.0, k=k[name])
            sums.add(name, out)
            if y is not None:
                sums.add_targets(self.bank.hookpoint[name], y.detach())
            if self.local:
                loss = self.auxk_alpha * out.auxk_loss + out.multi_topk_fvu / 8
                if loss.requires_grad:
                    parameters = list(coder.parameters())
                    found = torch.autograd.grad(
                        loss, parameters, retain_graph=True, allow_unused=True
                    )
                    for apart, gradient in zip(self._apart[name], found, strict=True):
                        apart += 0 if gradient is None else gradient
            return out.sae_out

        clean = None
        if self.loss_fn == "kl":
            with torch.no_grad():
                clean = last_hidden_state(self.lm, tokens)
        replace = {name: partial(reconstruct, name) for name in self.bank.hookpoint}
        excluded, run = self.exclude_tokens, self.run_modules
        with spliced(self.lm, replace, tokens, excluded, run_modules=run):
            hidden = last_hidden_state(self.lm, tokens)
        sums.rows += seen[0]
        if clean is None:
            loss, positions = cross_entropy(self.lm, hidden, tokens), tokens[:, 1:].numel()
        else:
            loss, positions = kl_divergence(self.lm, hidden, clean), tokens.numel()
        loss.backward()
        self._total += torch.stack([loss.detach(), loss.new_tensor(positions)])

    def finish_gradients_(self, sums: StepSums, exchange: Exchange) -> Tensor:
        """Put a step's gradients together, those of all ranks; return its mean loss.

        What is left to do is what is done to those of FVU: to divide by the variance.
        """
        apart = [t for tensors in self._apart.values() for t in tensors]
        exchange.sum_replicas_(self._total, *apart)
        loss, positions = self._total
        for name, coder in self.bank.items():
            scale = (sums.variance(name) / positions).to(coder.dtype)
            for i, parameter in enumerate(coder.parameters()):
                assert parameter.grad is not None, "gradients() comes first"
                parameter.grad *= scale
                if self.local:
                    parameter.grad += self._apart[name][i]
        self._start_step()
        return loss / positions
