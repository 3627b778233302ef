"""Other programs' coders as those programs define them, written from their documentation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sae import SaeConfig, SparseCoder, SparseCoderConfig, TranscoderConfig
from sae.coders.bank import CoderBank
from sae.config import Widths

JUMPRELU = {
    "sae": SaeConfig(num_latents=24, k=3, activation="jumprelu"),
    "skip sae": SaeConfig(num_latents=24, k=3, activation="jumprelu", skip_connection=True),
    "transcoder": TranscoderConfig(num_latents=24, k=3, activation="jumprelu"),
    "skip transcoder": TranscoderConfig(
        num_latents=24, k=3, activation="jumprelu", skip_connection=True
    ),
}

Forward = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Rows -> latents [N L] and reconstruction."""

KINDS = {
    "sae": SaeConfig(num_latents=24, k=3),
    "transcoder": TranscoderConfig(num_latents=24, k=3),
    "free norms": SaeConfig(num_latents=24, k=3, normalize_decoder=False),
}


def random_coder(cfg: SparseCoderConfig, d_in: int = 8, d_out: int | None = None) -> SparseCoder:
    """A coder with nothing at 0, unit rows where its config says so."""
    torch.manual_seed(0)
    coder = SparseCoder(d_in, cfg, d_out=d_out)
    for parameter in coder.parameters():
        parameter.data.normal_()
    if cfg.has_threshold:
        coder.threshold.data.uniform_(0.5, 3)
    coder.normalize_decoder_()
    return coder


def dense(coder: SparseCoder, x: Tensor) -> tuple[Tensor, Tensor]:
    """A coder's latents as [N L], and its reconstruction."""
    out = coder(x, torch.zeros(len(x), coder.d_out)) if coder.cfg.transcode else coder(x)
    latents = torch.zeros(len(x), coder.num_latents)
    return latents.scatter_add(1, out.top_indices, out.top_acts), out.sae_out


def sae_lens(cfg: dict[str, Any], t: dict[str, Tensor]) -> Forward:
    """What SAELens 6 computes from `cfg.json` and its tensors."""
    kind = cfg["architecture"]

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        given = x * 1.0
        if cfg["apply_b_dec_to_input"]:
            x = x - t["b_dec"]
        if kind == "gated":
            gate = (x @ t["W_enc"] + t["b_gate"]) > 0
            acts = gate * (x @ (t["W_enc"] * t["r_mag"].exp()) + t["b_mag"]).relu()
        else:
            pre = x @ t["W_enc"] + t["b_enc"]
            acts = pre.relu()
        scale = torch.ones(len(t["W_dec"]))
        if kind == "topk":
            if cfg["rescale_acts_by_decoder_norm"]:
                scale = t["W_dec"].norm(dim=1)
            top = (pre * scale).topk(cfg.get("k", 100))
            acts = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
        elif "jumprelu" in kind:
            acts = acts * (pre > t["threshold"])
        out = (acts / scale) @ t["W_dec"] + t["b_dec"]
        return acts, out + given @ t["W_skip"].T if "skip" in kind else out

    return forward


def dictionary_learning(trainer: dict[str, Any], t: dict[str, Tensor]) -> Forward:
    """What dictionary_learning 0.1 computes from its config and its tensors."""
    kind = trainer["dict_class"]

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        if kind == "JumpReluAutoEncoder":
            pre = x @ t["W_enc"] + t["b_enc"]
            acts = (pre * (pre > t["threshold"])).relu()
            return acts, acts @ t["W_dec"] + t["b_dec"]
        if kind == "MatryoshkaBatchTopKSAE":
            acts = ((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu()
            acts = acts * (acts > t["threshold"])
            return acts, acts @ t["W_dec"] + t["b_dec"]
        if kind == "GatedAutoEncoder":
            inner = (x - t["decoder_bias"]) @ t["encoder.weight"].T
            acts = (inner + t["gate_bias"] > 0) * (t["r_mag"].exp() * inner + t["mag_bias"]).relu()
            return acts, acts @ t["decoder.weight"].T + t["decoder_bias"]
        centre = t["bias" if kind == "AutoEncoder" else "b_dec"]
        acts = ((x - centre) @ t["encoder.weight"].T + t["encoder.bias"]).relu()
        if kind == "BatchTopKSAE":
            acts = acts * (acts > t["threshold"])
        elif kind == "AutoEncoderTopK":
            top = acts.topk(int(t["k"]))
            acts = torch.zeros_like(acts).scatter(1, top.indices, top.values)
        return acts, acts @ t["decoder.weight"].T + centre

    return forward


def circuit_tracer(t: dict[str, Tensor]) -> Forward:
    """What circuit-tracer computes from the file of one layer of a local set."""
    threshold = t.get("activation_function.threshold")

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        pre = x @ t["W_enc"].T + t["b_enc"]
        acts = pre.relu() if threshold is None else pre * (pre > threshold)
        out = acts @ t["W_dec"] + t["b_dec"]
        return acts, out + x @ t["W_skip"].T if "W_skip" in t else out

    return forward


def circuit_tracer_clt(folder: Path, rows: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """What circuit-tracer computes from the files of a cross-layer transcoder, of each layer."""
    acts, outs = [], []
    for i, x in enumerate(rows):
        t = load_file(folder / f"W_enc_{i}.safetensors")
        pre = x @ t[f"W_enc_{i}"].T + t[f"b_enc_{i}"]
        threshold = t.get(f"threshold_{i}")
        acts.append(pre.relu() if threshold is None else pre * (pre > threshold))
        outs.append(t[f"b_dec_{i}"].expand_as(x).clone())
    for source, latents in enumerate(acts):
        W_dec = load_file(folder / f"W_dec_{source}.safetensors")[f"W_dec_{source}"]
        for i in range(W_dec.shape[1]):
            outs[source + i] += latents @ W_dec[:, i]
    return acts, outs


def cross_layer_coders(
    cfg: SparseCoderConfig, layers: int = 6, d: int = 8
) -> dict[str, SparseCoder]:
    """A cross-layer transcoder of some layers, with nothing at 0."""
    torch.manual_seed(0)
    names = [f"layers.{i}.mlp" for i in range(layers)]
    bank = CoderBank(dict.fromkeys(names, Widths(d, d)), cfg, (0,), "cpu")
    for _, coder in bank.items():
        for parameter in coder.parameters():
            parameter.data.normal_()
        if cfg.has_threshold:
            coder.threshold.data.uniform_(0.5, 3)
    return dict(bank.items())


def assert_same_function(ours: SparseCoder, theirs: Forward, rows: int = 64) -> None:
    """Same latents and reconstructions, but for rounding."""
    x = torch.randn(rows, ours.d_in, generator=torch.Generator().manual_seed(1))
    for found, expected in zip(dense(ours, x), theirs(x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def assert_same_coder(a: SparseCoder, b: SparseCoder) -> None:
    """Same numbers in every tensor, latent and reconstruction, bit for bit."""
    kinds = [(c.d_in, c.d_out, c.cfg.activation, c.cfg.k, c.cfg.transcode) for c in (a, b)]
    assert kinds[0] == kinds[1]
    theirs = b.state_dict()
    assert a.state_dict().keys() == theirs.keys()
    assert [n for n, t in a.state_dict().items() if not torch.equal(t, theirs[n])] == []
    x = torch.randn(32, a.d_in)
    assert all(torch.equal(*pair) for pair in zip(dense(a, x), dense(b, x), strict=True))


def save_run(folder: Path, coders: dict[str, SparseCoder]) -> Path:
    """Coders as a run leaves them; its folder."""
    for name, coder in coders.items():
        coder.save_to_disk(folder / "step_5" / name)
    return folder
