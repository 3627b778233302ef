"""LMs that no forward on shapes alone can look into are trained on at any layer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build
from tiny_lms import TOKENS
from transformers import AutoModel, PreTrainedModel, xLSTMConfig

from sae import UsageError
from sae.flag_checks import from_flags
from sae.lm.capture import Capture, measure_widths
from sae.lm.loading import find_hookpoints, freeze, load_lm
from sae.lm.probe import checked
from sae.runs.dry_run import show_plan
from train_sae import TrainConfig


def xlstm() -> PreTrainedModel:
    """Its heads are rounded up to a width of 64, which the smallest do not survive."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "embedding_dim": 256, "num_heads": 2}
    return AutoModel.from_config(xLSTMConfig(vocab_size=96, num_hidden_layers=3, **sizes))


def hooked(lm: PreTrainedModel, module: str) -> torch.Tensor:
    """What a module returns, [B S D], by a plain hook on the whole LM."""
    seen: list[Any] = []
    handle = lm.get_submodule(module).register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        lm(input_ids=TOKENS)
    handle.remove()
    found = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    return found.view(*TOKENS.shape, -1)


@pytest.mark.parametrize(
    ("family", "layer", "inside"),
    [
        ("jetmoe", "layers", "layers.1.mlp"),
        ("deberta-v2", "encoder.layer", "encoder.layer.1.intermediate"),
        ("xlstm", "blocks", "blocks.1.ffn"),
    ],
)
def test_widths_come_from_the_loaded_lm(
    family: str, layer: str, inside: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows and widths are those of a hook on the whole LM; the dry run says what it cannot know."""
    whole = freeze(xlstm() if family == "xlstm" else build(family))
    whole.save_pretrained(tmp_path)
    model = {"model": str(tmp_path), "dry_run": True, "k": 2, "expansion_factor": 2}
    for names in ((f"{layer}.0",), (f"{layer}.1", inside)):
        cfg = from_flags(TrainConfig, {**model, "hookpoints": names})
        skeleton, hookpoints = find_hookpoints(cfg.model)
        lm = load_lm(cfg.model, skeleton, hookpoints)
        found = checked(Capture(lm, hookpoints), 16)(TOKENS)
        seen = {name: hooked(whole, name) for name in names}
        for name, expected in seen.items():
            torch.testing.assert_close(found[name][1], expected.flatten(0, 1))
            width = expected.shape[-1]
            assert measure_widths(lm, [name])[name].d_out == width
        if inside in names and family != "xlstm":  # runs on shapes alone, with sizes like these
            with pytest.raises(UsageError, match="--dry_run: .* runs only with its weights"):
                show_plan(cfg)
        else:
            show_plan(cfg)
            assert f"coders  of {2 * seen[names[0]].shape[-1]} latents" in capsys.readouterr().out
