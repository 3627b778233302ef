"""Which modules run, in which order and how often: from a forward, never from declarations."""

import re
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass

import torch
from torch._subclasses import FakeTensorMode
from transformers import PreTrainedModel

from ..flag_checks import UsageError
from .capture import reading_text, some_tokens
from .hookpoints import parse, text_layers


@dataclass(frozen=True)
class Trace:
    """What the modules of the base model did in one forward."""

    events: list[tuple[str, bool]]
    """(module, whether it ended), in order: a module starts, and later ends."""

    def calls(self) -> Counter[str]:
        """How often each module ran."""
        return Counter(name for name, ended in self.events if ended)

    def until(self, hookpoints: Iterable[str]) -> list[tuple[str, bool]]:
        """The events up to the first end of the last of the hookpoints."""
        missing = {parse(name).module for name in hookpoints}
        for i, (name, ended) in enumerate(self.events):
            if ended:
                missing.discard(name)
            if not missing:
                return self.events[: i + 1]
        return self.events


def trace_forward(lm: PreTrainedModel) -> Trace:
    """Run the LM on eight tokens and watch its modules; without weights, on shapes alone.

    Raises UsageError where the LM cannot read text, or not on shapes alone.
    """
    tokens = some_tokens(lm, 1, 8)
    events: list[tuple[str, bool]] = []
    with ExitStack() as hooks:
        for name, module in lm.base_model.named_modules():

            def starts(*_: object, name: str = name) -> None:
                events.append((name, False))

            def ends(*_: object, name: str = name) -> None:
                events.append((name, True))

            hooks.callback(module.register_forward_pre_hook(starts).remove)
            hooks.callback(module.register_forward_hook(ends).remove)
        on_shapes = FakeTensorMode(allow_non_fake_inputs=True) if tokens.is_meta else nullcontext()
        with on_shapes, torch.no_grad(), reading_text(lm):
            lm.base_model(input_ids=tokens)
    return Trace(events)


def layers_needed(lm: PreTrainedModel, hookpoints: Iterable[str], trace: Trace) -> int | None:
    """How many leading layers have started when the last hookpoint ends; None for all of them."""
    try:
        prefix, depth = text_layers(lm)
    except UsageError:
        return None
    layer = re.compile(rf"{re.escape(prefix)}\.(\d+)$")
    events = trace.until(hookpoints)
    modules = {parse(name).module for name in hookpoints}
    if not modules <= {name for name, ended in events if ended}:
        return None
    numbers = [int(found[1]) for name, _ in events if (found := layer.match(name))]
    needed = max(numbers, default=0) + 1
    return None if needed >= depth else needed


def check_calls(lm: PreTrainedModel, hookpoints: Iterable[str], trace: Trace) -> None:
    """Raise UsageError for a hookpoint that does not run exactly once in a forward."""
    calls, kind = trace.calls(), type(lm).__name__
    for name in hookpoints:
        times = calls[parse(name).module]
        if times == 0:
            raise UsageError(
                f"hookpoint {name} does not run when {kind} reads text: take it out of --hookpoints"
            )
        if times > 1:
            raise UsageError(
                f"hookpoint {name} runs {times} times when {kind} reads text once, so it "
                f"has no one row per token: one module serves several places of the LM. Take a "
                f"module around it, or one that enters or leaves it, for --hookpoints"
            )
