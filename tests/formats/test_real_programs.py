"""The files that are written, opened by the programs that they are for: run by --formats."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_runs import call
from loopback_hub import Repo, loopback_hub
from other_programs import JUMPRELU, KINDS, cross_layer_coders, dense, random_coder, save_run
from safetensors.torch import load_file
from torch import Tensor

from sae import SaeConfig, SparseCoder, TranscoderConfig
from sae.share.export import ExportConfig, export

pytestmark = pytest.mark.formats
LM = str(Path(__file__).parents[2] / "demo/lm")
ROWS = torch.randn(4096, 32, generator=torch.Generator().manual_seed(5))


def exported(tmp_path: Path, coder: SparseCoder, program: Any, hookpoint: str = "layers.3") -> Path:
    run = save_run(tmp_path / "run", {hookpoint: coder})
    (run / "run.json").write_text(json.dumps({"model": LM, "dataset": "x"}))
    (folder,) = export(ExportConfig(str(run), out=str(tmp_path / "out"), to=program))[0]
    return folder


def assert_same(coder: SparseCoder, acts: Tensor, out: Tensor) -> None:
    """Same latents and reconstructions on 4,096 rows to 1e-5, relative to the largest."""
    for found, expected in zip((acts, out), dense(coder, ROWS), strict=True):
        assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_sae_lens_computes_the_same(tmp_path: Path, kind: str) -> None:
    """encode and decode of SAE.load_from_disk, also folded, as SAEDashboard does."""
    from sae_lens import SAE  # pyright: ignore[reportMissingImports]

    coder = random_coder(KINDS[kind], 32)
    theirs = SAE.load_from_disk(str(exported(tmp_path, coder, "sae_lens")))
    acts = theirs.encode(ROWS)
    assert_same(coder, acts, theirs.decode(acts))
    if kind == "free norms":
        with pytest.raises(NotImplementedError):
            theirs.fold_W_dec_norm()
        return
    theirs.fold_W_dec_norm()
    acts = theirs.encode(ROWS)
    assert_same(coder, acts, theirs.decode(acts))


@pytest.mark.parametrize("kind", [*JUMPRELU, "another width", "batchtopk"])
@torch.no_grad()
def test_sae_lens_computes_the_same_with_thresholds(tmp_path: Path, kind: str) -> None:
    """The same of JumpReLU coders, skip connection and all, before and after folding."""
    from sae_lens import SAE  # pyright: ignore[reportMissingImports]

    if kind == "batchtopk":
        coder = random_coder(SaeConfig(num_latents=24, k=3, activation="batchtopk"), 32)
        coder.threshold.data.fill_(1.5)
    elif kind == "another width":
        coder = random_coder(JUMPRELU["transcoder"], 32, d_out=40)
    else:
        coder = random_coder(JUMPRELU[kind], 32)
    theirs = SAE.load_from_disk(str(exported(tmp_path, coder, "sae_lens")))
    assert_same(coder, theirs.encode(ROWS), theirs(ROWS))
    theirs.fold_W_dec_norm()
    assert_same(coder, theirs.encode(ROWS), theirs(ROWS))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_dictionary_learning_computes_the_same(tmp_path: Path, kind: str) -> None:
    """load_dictionary, encode and decode."""
    from dictionary_learning.utils import load_dictionary  # pyright: ignore[reportMissingImports]

    coder = random_coder(KINDS[kind], 32)
    folder = exported(tmp_path, coder, "dictionary_learning")
    theirs, config = load_dictionary(str(folder), "cpu")
    acts = theirs.encode(ROWS)
    assert_same(coder, acts, theirs.decode(acts))
    assert config["trainer"]["layer"] == 3


@pytest.mark.parametrize("kind", ["sae", "one threshold", "batchtopk", "matryoshka", "transcoder"])
@torch.no_grad()
def test_dictionary_learning_computes_the_same_with_thresholds(tmp_path: Path, kind: str) -> None:
    """BatchTopKSAE, with prefixes too, and JumpReluAutoEncoder, as load_dictionary makes them."""
    from dictionary_learning.utils import load_dictionary  # pyright: ignore[reportMissingImports]

    coder = random_coder(JUMPRELU["transcoder" if kind == "transcoder" else "sae"], 32)
    if kind == "batchtopk":
        coder = random_coder(SaeConfig(num_latents=24, k=3, activation="batchtopk"), 32)
    if kind == "matryoshka":
        shares = (0.25, 0.25, 0.5)
        cfg = SaeConfig(num_latents=24, k=3, activation="batchtopk", matryoshka=shares)
        coder = random_coder(cfg, 32)
    if kind in ("one threshold", "batchtopk", "matryoshka"):
        coder.threshold.data.fill_(1.5)
    theirs, _ = load_dictionary(str(exported(tmp_path, coder, "dictionary_learning")), "cpu")
    acts = theirs.encode(ROWS)
    assert_same(coder, acts, theirs.decode(acts))


@torch.no_grad()
def test_a_matryoshka_coder_of_dictionary_learning_is_the_same_here(tmp_path: Path) -> None:
    """As its own class saves it, with its groups and the threshold that it learned."""
    module = import_module("dictionary_learning.trainers.matryoshka_batch_top_k")
    theirs = module.MatryoshkaBatchTopKSAE(32, 64, 5, [8, 24, 32])
    for parameter in theirs.parameters():
        parameter.data.normal_()
    theirs.threshold.fill_(2.0)
    torch.save(theirs.state_dict(), tmp_path / "ae.pt")
    trainer = {"dict_class": "MatryoshkaBatchTopKSAE", "activation_dim": 32, "dict_size": 64}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {**trainer, "k": 5}}))
    acts = theirs.encode(ROWS)
    ours = SparseCoder.load_from_disk(tmp_path, allow_pt=True)
    assert_same(ours, acts, theirs.decode(acts))


@torch.no_grad()
def test_sae_lens_joins_the_heads(tmp_path: Path) -> None:
    """A coder of what attention's heads give takes them as TransformerLens' hook_z has them."""
    from sae_lens import SAE  # pyright: ignore[reportMissingImports]

    coder, hookpoint = random_coder(KINDS["sae"], 32), "layers.3.attention.dense:input"
    theirs = SAE.load_from_disk(str(exported(tmp_path, coder, "sae_lens", hookpoint)))
    assert theirs.cfg.metadata.hook_name == "blocks.3.attn.hook_z"
    acts = theirs.encode(ROWS.view(-1, 4, 8))
    assert_same(coder, acts, theirs.decode(acts).flatten(1))


@torch.no_grad()
def test_sae_lens_puts_transcoders_in_the_place_of_mlps(tmp_path: Path) -> None:
    """Its LM has the hook that the files name; its logits are those with our outputs there."""
    from sae_lens import SAE, HookedSAETransformer  # pyright: ignore[reportMissingImports]
    from transformer_lens import HookedTransformerConfig  # pyright: ignore[reportMissingImports]

    coder = random_coder(JUMPRELU["transcoder"], 32)
    theirs = SAE.load_from_disk(str(exported(tmp_path, coder, "sae_lens", "layers.1.mlp")))
    sizes = {"n_layers": 2, "d_model": 32, "n_ctx": 16, "d_head": 8, "n_heads": 4, "d_vocab": 50}
    lm = HookedSAETransformer(HookedTransformerConfig(**sizes, act_fn="gelu", seed=0))
    tokens = torch.randint(0, 50, (4, 16), generator=torch.Generator().manual_seed(2))
    rows = lm.run_with_cache(tokens)[1][theirs.cfg.metadata.hook_name].flatten(0, 1)
    ours = dense(coder, rows)[1].view(4, 16, 32)
    place = [("blocks.1.hook_mlp_out", lambda *_, hook: ours)]
    expected = lm.run_with_hooks(tokens, fwd_hooks=place)
    found = lm.run_with_saes(tokens, saes=[theirs])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, lm(tokens), atol=0.1)


@pytest.mark.parametrize("kind", ["topk", "jumprelu", "heads"])
@torch.no_grad()
def test_sae_dashboard_sees_the_same(tmp_path: Path, kind: str) -> None:
    """How often and how strongly latents fire, as SAEDashboard (and so Neuronpedia) says it."""
    from sae_dashboard.sae_vis_data import SaeVisConfig  # pyright: ignore[reportMissingImports]
    from sae_dashboard.sae_vis_runner import SaeVisRunner  # pyright: ignore[reportMissingImports]
    from sae_lens import SAE, HookedSAETransformer  # pyright: ignore[reportMissingImports]
    from transformer_lens import HookedTransformerConfig  # pyright: ignore[reportMissingImports]

    coder = random_coder(JUMPRELU["sae"] if kind == "jumprelu" else KINDS["sae"], 32)
    hookpoint = "layers.1.attention.dense:input" if kind == "heads" else "layers.1"
    theirs = SAE.load_from_disk(str(exported(tmp_path, coder, "sae_lens", hookpoint)))
    hook = theirs.cfg.metadata.hook_name
    sizes = {"n_layers": 2, "d_model": 32, "n_ctx": 16, "d_head": 8, "n_heads": 4, "d_vocab": 50}
    lm = HookedSAETransformer(HookedTransformerConfig(**sizes, act_fn="gelu", seed=0))
    tokens = torch.randint(0, 50, (64, 16), generator=torch.Generator().manual_seed(2))
    seen = SaeVisConfig(hook_point=hook, features=[0, 5, 7], minibatch_size_features=3)
    found = SaeVisRunner(seen).run(encoder=theirs, model=lm, tokens=tokens).feature_stats
    rows = lm.run_with_cache(tokens)[1][hook].reshape(-1, 32)
    acts = dense(coder, rows)[0][:, [0, 5, 7]]
    torch.testing.assert_close(torch.tensor(found.max), acts.amax(0), rtol=1e-4, atol=1e-5)
    shares = (acts > 0).float().mean(0)
    assert torch.tensor(found.frac_nonzero).tolist() == pytest.approx(shares.tolist(), abs=1e-3)


@pytest.mark.parametrize("kind", ["transcoder", "skip transcoder"])
@torch.no_grad()
def test_circuit_tracer_computes_the_same(tmp_path: Path, kind: str) -> None:
    """A set of all layers by its own loader: encode, decode, and what goes past the latents."""
    load = import_module("circuit_tracer.transcoder.single_layer_transcoder").load_transcoder_set
    coders = {f"layers.{i}.mlp": random_coder(JUMPRELU[kind], 32) for i in range(6)}
    for i, coder in enumerate(coders.values()):
        coder.b_dec.data.add_(i)
    run, out = save_run(tmp_path / "run", coders), tmp_path / "out"
    (run / "run.json").write_text(json.dumps({"model": LM, "dataset": "x"}))
    export(ExportConfig(str(run), out=str(out), to="circuit_tracer"))
    config = yaml.safe_load((out / "config.yaml").read_text())
    hooks = {name: config[name] for name in ("feature_input_hook", "feature_output_hook")}
    files = {i: str(out / f"layer_{i}.safetensors") for i in range(6)}
    device = torch.device("cpu")
    theirs = load(files, scan="x", **hooks, device=device, dtype=torch.float32)
    assert theirs.skip_connection is ("skip" in kind) and len(theirs) == 6
    for i, coder in enumerate(coders.values()):
        assert_same(coder, theirs[i].encode(ROWS), theirs[i](ROWS))


@torch.no_grad()
def test_circuit_tracer_computes_the_same_across_layers(tmp_path: Path) -> None:
    """A cross-layer transcoder by its own loader: what is active, and what it adds up to."""
    load = import_module("circuit_tracer.transcoder.cross_layer_transcoder").load_clt
    cfg = TranscoderConfig(num_latents=24, k=3, activation="jumprelu", cross_layer=2)
    coders = cross_layer_coders(cfg, d=32)
    run, out = save_run(tmp_path / "run", coders), tmp_path / "out"
    (run / "run.json").write_text(json.dumps({"model": LM, "dataset": "x"}))
    export(ExportConfig(str(run), out=str(out), to="circuit_tracer"))
    theirs = load(str(out), device=torch.device("cpu"), dtype=torch.float32, lazy_decoder=False)
    rows = ROWS.repeat(6, 1, 1) * torch.arange(1, 7).view(6, 1, 1)
    acts = theirs.encode(rows)
    outs = theirs.decode(acts.to_sparse())
    for i, coder in enumerate(coders.values()):
        for found, expected in zip((acts[i], outs[i]), dense(coder, rows[i]), strict=True):
            assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize(
    "kind",
    (
        *("standard", "gated", "jumprelu", "transcoder", "skip_transcoder"),
        *("jumprelu_transcoder", "jumprelu_skip_transcoder"),
    ),
)
@torch.no_grad()
def test_other_coders_of_sae_lens_are_the_same_here(tmp_path: Path, kind: str) -> None:
    """Coders that SAELens itself wrote, of the kinds that are read through thresholds."""
    from sae_lens.registry import get_sae_class  # pyright: ignore[reportMissingImports]

    sae_class, cfg_class = get_sae_class(kind)
    others = {"d_out": 40, "apply_b_dec_to_input": False} if "transcoder" in kind else {}
    theirs = sae_class(cfg_class(d_in=32, d_sae=64, **others))
    for parameter in theirs.parameters():
        parameter.data.normal_()
    theirs.save_model(str(tmp_path / "c"))
    assert_same(SparseCoder.load_from_disk(tmp_path / "c"), theirs.encode(ROWS), theirs(ROWS))


@torch.no_grad()
def test_what_sae_lens_saves_is_the_same_here(tmp_path: Path) -> None:
    """A TopK SAE that SAELens itself wrote."""
    from sae_lens import TopKSAE, TopKSAEConfig  # pyright: ignore[reportMissingImports]

    cfg = TopKSAEConfig(d_in=32, d_sae=64, k=5, rescale_acts_by_decoder_norm=True)
    theirs = TopKSAE(cfg)
    for parameter in theirs.parameters():
        parameter.data.normal_()
    theirs.save_model(str(tmp_path / "c"))
    acts = theirs.encode(ROWS)
    assert_same(SparseCoder.load_from_disk(tmp_path / "c"), acts, theirs.decode(acts))


FROM_HUB = """
import sys, torch
from huggingface_hub import constants
constants.HF_HUB_ENABLE_HF_TRANSFER = False  # dropped, but circuit-tracer asks for it
from circuit_tracer.utils.hf_utils import load_transcoder_from_hub
from safetensors.torch import save_file
from sae_lens import SAE
rows = torch.randn(4096, 32, generator=torch.Generator().manual_seed(5))
with torch.no_grad():
    lens = SAE.from_pretrained("org/run", "sae_lens/layers.3.mlp", device="cpu")
    found = {"sae_lens acts": lens.encode(rows), "sae_lens out": lens(rows)}
    traced, config = load_transcoder_from_hub("org/run/circuit_tracer", torch.device("cpu"))
    assert (len(traced), config["model_kind"]) == (6, "transcoder_set")
    found |= {"traced acts": traced[3].encode(rows), "traced out": traced[3](rows)}
    assert traced.feature_input_hook == "mlp.hook_in"
    assert traced.feature_output_hook == "mlp.hook_out"
save_file(found, sys.argv[1])
"""


def test_programs_pull_a_pushed_run_by_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SAE.from_pretrained and circuit-tracer's reading of config.yaml, by repository and folder."""
    coders = {f"layers.{i}.mlp": random_coder(JUMPRELU["transcoder"], 32) for i in range(6)}
    run, out = save_run(tmp_path / "run", coders), tmp_path / "out"
    (run / "run.json").write_text(json.dumps({"model": LM, "dataset": "x"}))
    figures = {name: {"fvu": 0.1, "l0": 3.0, "dead_share": 0.0} for name in coders}
    summary = {"step": 5, "tokens": 640, "wall_seconds": 2.0, "hookpoints": figures}
    (run / "summary.json").write_text(json.dumps(summary))
    push = ("push", str(run), "org/run", "--as", "sae_lens", "circuit_tracer")
    assert call(monkeypatch, *push, "--dry_run", str(out)) == 0
    files = {f.relative_to(out).as_posix(): f.read_bytes() for f in out.rglob("*") if f.is_file()}
    with loopback_hub() as hub:
        hub.repos["org/run"] = Repo({"main": files})
        theirs = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            *([sys.executable, "-c", FROM_HUB, str(tmp_path / "found.safetensors")],),
            env={**os.environ, **theirs, "HF_HUB_DISABLE_XET": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "found.safetensors")
    for program in ("sae_lens", "traced"):
        acts, outputs = found[f"{program} acts"], found[f"{program} out"]
        assert_same(coders["layers.3.mlp"], acts, outputs)
