"""Every command takes the files of every program that docs/files.md lists as read."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command_runs import call
from other_programs import (
    JUMPRELU,
    KINDS,
    assert_same_coder,
    cross_layer_coders,
    random_coder,
    save_run,
)
from safetensors.torch import save_file
from torch import Tensor

from sae import TranscoderConfig, UsageError, load_many
from sae.coders.bank import CoderBank
from sae.config import Widths
from sae.formats import kinds
from sae.judge.trained import CodersConfig, named_coders
from sae.share.export import ExportConfig, Program, export

LM, D, L = str(Path(__file__).parents[2] / "demo/lm"), 192, 24
ACROSS = "circuit_tracer's cross-layer transcoders"


def tensors() -> dict[str, Tensor]:
    """A JumpReLU coder [D, L], in Gemma Scope's names."""
    generator = torch.Generator().manual_seed(4)
    shapes = {"W_enc": (D, L), "W_dec": (L, D), "b_enc": (L,), "b_dec": (D,)}
    found = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**found, "threshold": torch.rand(L, generator=generator)}


def by_export(program: Program) -> Callable[[Path], Path]:
    """A writer of files that our own exporter makes."""

    def write(folder: Path) -> Path:
        if program == "circuit_tracer":
            coder = random_coder(JUMPRELU["transcoder"], D)
            coders = {f"layers.{i}.mlp": coder for i in range(6)}
        else:
            coders = {"layers.1": random_coder(KINDS["sae"], D)}
        run = save_run(folder / "run", coders)
        (run / "run.json").write_text(json.dumps({"model": LM, "dataset": "x"}))
        export(ExportConfig(str(run), out=str(folder / "theirs"), to=program))
        return folder / "theirs"

    return write


def across_layers(folder: Path) -> Path:
    """A cross-layer transcoder of the demo's LM for circuit-tracer."""
    cfg = TranscoderConfig(num_latents=L, k=3, activation="jumprelu", cross_layer=2)
    run = save_run(folder / "run", cross_layer_coders(cfg, d=D))
    (run / "run.json").write_text(json.dumps({"model": LM, "dataset": "x"}))
    export(ExportConfig(str(run), out=str(folder / "theirs"), to="circuit_tracer"))
    return folder / "theirs"


def gemma_1(folder: Path) -> Path:
    """What Gemma Scope's repositories hold."""
    inner = folder / "gemma-scope-2b-pt-res/layer_1/width_16k/average_l0_82"
    inner.mkdir(parents=True)
    np.savez(inner / "params.npz", **{n: t.numpy() for n, t in tensors().items()})
    return inner


def gemma_2(folder: Path) -> Path:
    """What Gemma Scope 2's repositories hold."""
    inner = folder / "resid_post/layer_1"
    inner.mkdir(parents=True)
    small = {"W_enc": "w_enc", "W_dec": "w_dec"}
    save_file({small.get(n, n): t for n, t in tensors().items()}, inner / "params.safetensors")
    config = {"architecture": "jump_relu", "hf_hook_point_in": "model.layers.1.output", "l0": 9}
    (inner / "config.json").write_text(json.dumps(config))
    return inner


def llama(folder: Path) -> Path:
    """What Llama Scope's repositories hold."""
    (folder / "L1R-8x/checkpoints").mkdir(parents=True)
    found = tensors()
    named = {"encoder.weight": found["W_enc"].T, "encoder.bias": found["b_enc"]}
    named |= {"decoder.weight": found["W_dec"].T, "decoder.bias": found["b_dec"]}
    weights = {n: t.contiguous() for n, t in named.items()}
    save_file(weights, folder / "L1R-8x/checkpoints/final.safetensors")
    config = {"d_model": D, "d_sae": L, "jump_relu_threshold": 0.6, "top_k": 9}
    config |= {"dataset_average_activation_norm": {"in": 4.0, "out": 4.0}}
    config |= {"hook_point_in": "blocks.1.hook_resid_post"}
    (folder / "L1R-8x/hyperparams.json").write_text(json.dumps(config))
    return folder / "L1R-8x"


def qwen(folder: Path) -> Path:
    """What Qwen Scope's repositories hold."""
    inner = folder / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_3"
    inner.mkdir(parents=True)
    found = tensors()
    del found["threshold"]
    turned = {n: t.T.contiguous() if t.dim() == 2 else t for n, t in found.items()}
    torch.save(turned, inner / "layer1.sae.pt")
    return inner


def openai(folder: Path) -> Path:
    """What OpenAI published for GPT-2, in a folder that does not say where it reads."""
    inner = folder / "sites/autoencoders"
    inner.mkdir(parents=True)
    found = tensors()
    named = {"encoder.weight": found["W_enc"].T.contiguous(), "activation": "ReLU"}
    named |= {"decoder.weight": found["W_dec"].T.contiguous()}
    torch.save({**named, "latent_bias": found["b_enc"], "pre_bias": found["b_dec"]}, inner / "1.pt")
    return inner.parent


FILES = {
    "sparsify": by_export("sparsify"),
    "sae_lens": by_export("sae_lens"),
    "dictionary_learning": by_export("dictionary_learning"),
    "circuit_tracer": by_export("circuit_tracer"),
    ACROSS: across_layers,
    "Gemma Scope": gemma_1,
    "Gemma Scope 2": gemma_2,
    "Llama Scope": llama,
    "Qwen Scope": qwen,
    "OpenAI": openai,
}


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_every_command_takes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """evaluate, compare, features and --finetune see the coders that export makes ours of them."""
    monkeypatch.chdir(tmp_path)
    theirs = str(FILES[kind](tmp_path / "files"))
    Path("text.txt").write_text("def f(x):\n    return x + 1\n\n\nprint(f(3))\n" * 300)
    pickle = ("--allow_pt",) if kind in ("dictionary_learning", "Qwen Scope", "OpenAI") else ()
    alone = ("--hookpoint", "layers.1") if kind not in ("circuit_tracer", ACROSS) else ()
    command = (theirs, *alone, *pickle)
    where = ("--model", LM, "--dataset", "text.txt", "--ctx_len", "64", "--tokens", "128")

    assert call(monkeypatch, "export", *command, "--out", "ours") == 0
    ours, read = load_many("ours"), load_many(theirs, allow_pt=True)
    assert list(ours) == (["layers.1"] if alone else list(read))
    for mine, other in zip(ours.values(), read.values(), strict=True):
        assert_same_coder(mine, other)

    assert call(monkeypatch, "evaluate", *command, *where, "--out", "theirs.json") == 0
    assert call(monkeypatch, "evaluate", "ours", *where, "--out", "ours.json") == 0
    figures = [json.loads(Path(f"{name}.json").read_text()) for name in ("theirs", "ours")]
    assert figures[0]["coders"] == figures[1]["coders"]

    assert call(monkeypatch, "compare", theirs, "ours", *alone, *pickle, *where) == 0
    compared = json.loads(Path("comparison.json").read_text())
    assert {(pair["of_a"], pair["of_b"]) for pair in compared["twins"]} == {(1.0, 1.0)}
    page = ("--out", "page.html", "--latents", "3", "--twins", "ours")
    assert call(monkeypatch, "features", *command, *where, *page) == 0
    data = re.search(r'id="data">(.*?)</script>', Path("page.html").read_text(), re.S)
    assert data is not None
    shown = {coder["name"]: coder["twins"] for coder in json.loads(data[1])["coders"]}
    assert shown.keys() == ours.keys()
    assert all((twins["of_these"], twins["of_those"]) == (1, 1) for twins in shown.values())

    cfg = next(iter(ours.values())).cfg
    if kind == ACROSS:
        cfg = replace(cfg, cross_layer=2, sources=(), targets=())
    bank = CoderBank(dict.fromkeys(read, Widths(D, D)), cfg, (0,), "cpu")
    bank.load_pretrained(theirs, allow_pt=bool(pickle))
    for name, coder in read.items():
        assert coder.state_dict().keys() == bank[name].state_dict().keys()
        kept = bank[name].state_dict()
        assert all(torch.equal(kept[n], tensor) for n, tensor in coder.state_dict().items())


@pytest.mark.parametrize("kind", ["Gemma Scope", "Gemma Scope 2"])
def test_transcoders_between_two_modules_are_not_judged(tmp_path: Path, kind: str) -> None:
    """Gemma's go from one norm to another: at one hookpoint their figures would be wrong."""
    folder = FILES[kind](tmp_path)
    if kind == "Gemma Scope":
        folder = folder.rename(tmp_path / "gemma-scope-2b-pt-transcoders")
    else:
        config = json.loads((folder / "config.json").read_text())
        config["hf_hook_point_out"] = "model.layers.1.post_feedforward_layernorm.output"
        (folder / "config.json").write_text(json.dumps(config))
    (coder,) = load_many(folder).values()
    assert coder.cfg.transcode
    with pytest.raises(UsageError, match="a transcoder of Gemma Scope, from what .* two modules"):
        named_coders(CodersConfig(str(folder), model=LM, hookpoint="layers.1.mlp"))
