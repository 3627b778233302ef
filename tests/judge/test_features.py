"""Laws of the features page: its numbers, its bounds, and what it does in a real browser."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import torch
import torch.nn.functional as F
from command_runs import call
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_lms import WITH_HEAD, make_with_head
from torch import Tensor

from sae import SaeConfig, SparseCoder, UsageError, load_many
from sae.flag_checks import from_flags
from sae.judge.contexts import AFTER, BEFORE, SAMPLED, TOP, Contexts
from sae.judge.features import FeaturesConfig, page, page_data
from sae.judge.latents import Words, logit_effects, neighbours
from sae.judge.trained import CodersConfig
from train_sae import TrainConfig, train

ROOT = Path(__file__).parents[2]
HOSTILE = (
    '<script>document.title="owned"</script><img src=x onerror="document.title=1">&amp;</script>'
)
BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)


def sequences(count: int, seed: int = 0) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Token ids, activations and indices of sequences of 30 tokens; 8 latents, 3 active."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        acts, indices = torch.rand(30, 8, generator=generator).topk(3, dim=1)
        found.append((torch.randint(0, 99, (30,), generator=generator), acts - 0.4, indices))
    return found


def contexts_of(count: int, kept: Tensor | None = None) -> Contexts:
    contexts = Contexts(8, torch.tensor([5, 2, 7]))
    kept = torch.ones(30, dtype=torch.bool) if kept is None else kept
    for tokens, acts, indices in sequences(count):
        contexts.add_sequence(tokens, kept, acts[kept].relu(), indices[kept])
    return contexts


@pytest.mark.parametrize("some_left_out", [False, True])
def test_top_contexts_are_the_largest_activations(some_left_out: bool) -> None:
    """Counts, maxima and top contexts are those of a search through everything that was seen."""
    kept = torch.arange(30) % 7 != 3 if some_left_out else torch.ones(30, dtype=torch.bool)
    contexts = contexts_of(40, kept)
    dense = []
    for _, acts, indices in sequences(40):
        dense.append(torch.zeros(30, 8).scatter(1, indices, acts.relu()) * kept[:, None])
    seen = torch.stack(dense)
    assert torch.equal(contexts.fired, (seen > 0).sum((0, 1)).double())
    assert torch.equal(contexts.largest, seen.amax((0, 1)))
    assert contexts.rows == 40 * int(kept.sum())
    for slot, latent in enumerate((5, 2, 7)):
        peaks, at = seen[:, :, latent].max(dim=1)
        best = peaks.argsort(descending=True)[:TOP].tolist()
        for example, which in zip(contexts.top(slot), best, strict=True):
            begin = max(0, int(at[which]) - BEFORE)
            end = int(at[which]) + AFTER + 1
            assert example.tokens == sequences(40)[which][0][begin:end].tolist()
            assert example.acts == seen[which, begin:end, latent].tolist()
            assert begin + example.peak == at[which]


def test_examples_come_from_every_part_of_the_range() -> None:
    """Sampled contexts lie in the part they are listed under, and the same pass finds the same."""
    contexts = contexts_of(60)
    for slot, latent in enumerate((5, 2, 7)):
        parts = contexts.intervals(slot)
        assert parts == contexts_of(60).intervals(slot)
        assert len(parts) == 4 and all(len(part) == 2 for part in parts[:3])
        for i, part in enumerate(parts):
            for example in part:
                share = example.acts[example.peak] / float(contexts.largest[latent])
                assert (3 - i) / 4 <= share <= (4 - i) / 4


def test_sample_is_in_proportion_to_activation() -> None:
    """Of many contexts with activation 1 and as many with 3, a sample holds three times as many."""
    strong = 0
    for seed in range(20):
        contexts = Contexts(1, torch.tensor([0]), seed)
        for i in range(400):
            act = torch.tensor([[1.0 + 2.0 * (i % 2)]])
            contexts.add_sequence(torch.tensor([i]), torch.tensor([True]), act, torch.tensor([[0]]))
        strong += sum(int(t) % 2 for t in contexts._sample.tokens[0, :, BEFORE])
    assert strong / (20 * SAMPLED) == pytest.approx(0.75, abs=0.06)


def test_memory_of_contexts_does_not_grow_with_tokens() -> None:
    """What is kept has the same size after 5 sequences and after 100, for latents looked at."""

    def size(contexts: Contexts) -> int:
        tables = [*contexts._top, *contexts._sample, contexts.fired, contexts.largest]
        return sum(t.numel() * t.element_size() for t in tables)

    assert size(contexts_of(5)) == size(contexts_of(100))
    per_latent = (TOP + SAMPLED) * ((BEFORE + 1 + AFTER) * 8 + 4)
    assert size(Contexts(10**6, torch.arange(3))) == 3 * per_latent + 10**6 * 12


def test_promoted_tokens_are_those_of_the_unembedding() -> None:
    """A direction along a token's unembedding row promotes it; values are head(norm(v)) centred."""
    lm = make_with_head(WITH_HEAD["llama"][0])
    head: Any = lm.get_output_embeddings()
    rows = head.weight.detach()[[3, 41]]
    effects = logit_effects(lm, "layers.1", rows, count=64)
    for token, v, (promoted, suppressed) in zip((3, 41), rows, effects, strict=True):
        logits = head.weight @ (v / v.square().mean().sqrt())
        centred = (logits - logits.mean()).detach()
        assert promoted[0][0] == token and promoted == suppressed[::-1]
        for index, value in promoted:
            assert value == pytest.approx(float(centred[index]), abs=2e-3)
    assert logit_effects(lm, "layers.1", torch.ones(2, 31)) == [([], [])] * 2
    for within in ("layers.1.self_attn.q_proj", "layers.1.input_layernorm", "h.1.ln_1"):
        assert logit_effects(lm, within, rows) == [([], [])] * 2
    for family, (config, _) in WITH_HEAD.items():
        of_family = make_with_head(config)
        assert logit_effects(of_family, "h.0.mlp", torch.randn(1, 32))[0][0], family


def test_neighbours_are_the_largest_cosines() -> None:
    """Neighbours are the other latents by decoder cosine, in order, never the latent itself."""
    coder = SparseCoder(6, SaeConfig(num_latents=20, k=2, normalize_decoder=False))
    assert coder.W_dec is not None
    coder.W_dec.data *= torch.rand(20, 1) + 0.5
    rows = coder.W_dec.detach()
    cosines = F.cosine_similarity(rows[:, None], rows[None], dim=2)
    for latent, near in zip((4, 11), neighbours(coder, torch.tensor([4, 11])), strict=True):
        order = [i for i in cosines[latent].argsort(descending=True).tolist() if i != latent]
        assert [i for i, _ in near] == order[:8]
        assert near[0][1] == pytest.approx(float(cosines[latent, order[0]]), abs=1e-3)


def test_pieces_keep_their_leading_space() -> None:
    """A piece that stands for a space and a word reads so, though decoded alone it loses it."""

    class Pieces:
        def decode(self, ids: list[int], **_: Any) -> str:
            return ["the", "\ufffd"][ids[0]]

        def convert_ids_to_tokens(self, token: int) -> str:
            return ["\u2581the", "<0xE2>"][token]

    words = Words(Pieces())
    assert [words(0), words(1), words(0)] == [0, 1, 0]
    assert words.texts == [" the", "\ufffd"]
    numbers = Words(None)
    assert numbers(17) == 0 and numbers.texts == ["<17>"]


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on the demo LM, on text that is partly markup."""
    folder = tmp_path_factory.mktemp("features")
    files = ("train_sae.py", "sae/data/text.py", "README.md")
    texts = [(ROOT / file).read_text() for file in files]
    lines = [json.dumps({"text": HOSTILE * 3 + text}) for text in texts * 4]
    (folder / "text.jsonl").write_text("\n".join(lines))
    flags = {
        **{"model": str(ROOT / "demo/lm"), "dataset": str(folder / "text.jsonl")},
        **{"hookpoints": ("layers.1", "layers.2.mlp"), "ctx_len": 64, "batch_size": 8},
        **{"max_examples": 160, "expansion_factor": 2, "k": 8, "eval_tokens": 4096},
        **{"save_dir": str(folder), "run_name": "run"},
    }
    train(from_flags(TrainConfig, flags))
    return folder / "run"


@pytest.fixture(scope="module")
def written(demo_run: Path) -> Path:
    """The page that the command writes."""
    out = demo_run / "report.html"
    command = [sys.executable, "-m", "sae", "features", str(demo_run), "--out", str(out)]
    done = subprocess.run(
        [*command, "--latents", "40"], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert str(out) in done.stdout
    return out


def test_page_stands_alone_and_holds_no_markup_of_the_data(written: Path, demo_run: Path) -> None:
    """Nothing in it is fetched, its data hold no sign of markup, and a pass is repeatable."""
    text = written.read_text()
    assert not re.search(r"""(src|href)=["']?\w+:|@import|url\(""", text)
    assert "default-src 'none'" in text
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert data is not None and not set("<>&") & set(data[1])
    found = json.loads(data[1])
    assert any("<" in word for word in found["vocabulary"])
    assert [c["name"] for c in found["coders"]] == ["layers.1", "layers.2.mlp"]
    assert found["curves"]["fvu"].keys() == {"layers.1", "layers.2.mlp"}
    for coder in found["coders"]:
        assert len(coder["latents"]) == 40 and sum(coder["histogram"]) == coder["alive"]
        assert coder["figures"]["fvu"] > 0 and coder["figures"].keys() <= found["names"].keys()
        for latent in coder["latents"]:
            assert latent["top"] and latent["fired"] and len(latent["promoted"]) == 10
            assert latent["top"][0]["a"][latent["top"][0]["p"]] == latent["largest"]
    config = FeaturesConfig(str(demo_run), latents=40)
    assert page(page_data(config)) == text


def test_latents_by_number(demo_run: Path) -> None:
    """--ids shows just these; one that no coder has is a readable error."""
    alive = {
        c["name"]: c["latents"][0]["id"] for c in page_data(FeaturesConfig(str(demo_run)))["coders"]
    }
    chosen = FeaturesConfig(str(demo_run), ids=tuple(alive.values()), tokens=1024)
    for coder in page_data(chosen)["coders"]:
        assert {latent["id"] for latent in coder["latents"]} <= set(alive.values())
    with pytest.raises(UsageError, match="--ids 999999: layers.1 has latents 0 to"):
        page_data(FeaturesConfig(str(demo_run), ids=(999999,)))
    assert isinstance(chosen, CodersConfig)


@pytest.fixture(scope="module")
def twins_page(demo_run: Path) -> tuple[dict[str, Any], dict[int, int]]:
    """The page with other coders beside: latents of one of the run's, shuffled, one of them dead.

    With it the number there of every latent here.
    """
    coder = load_many(demo_run)["layers.1"]
    order = torch.randperm(coder.num_latents, generator=torch.Generator().manual_seed(1))
    found = page_data(FeaturesConfig(str(demo_run), latents=40))["coders"][0]["latents"]
    dead = found[0]["id"]
    assert coder.W_dec is not None
    for tensor in (coder.encoder.weight, coder.encoder.bias, coder.W_dec):
        tensor.data.copy_(tensor.data[order])
    there = dict(zip(order.tolist(), range(coder.num_latents), strict=True))
    coder.encoder.bias.data[there[dead]] = -1e9
    coder.save_to_disk(demo_run.parent / "others" / "layers.1")
    out = demo_run.parent / "twins.html"
    command = ["--twins", str(demo_run.parent / "others"), "--latents", "40", "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        assert call(patch, "features", str(demo_run), *command) == 0
    data = re.search(r'id="data">(.*?)</script>', out.read_text(), re.S)
    assert data is not None
    return json.loads(data[1]), there


def test_twins_stand_side_by_side(
    twins_page: tuple[dict[str, Any], dict[int, int]], demo_run: Path
) -> None:
    """Beside a latent its nearest decoder row there, with contexts of its own; if dead, without."""
    found, there = twins_page
    first, second = found["coders"]
    assert second["twins"] is None and "twin" not in second["latents"][0]
    assert first["twins"] == {
        **{"source": "others", "name": "layers.1", "near": 0.7},
        **{"of_these": 1.0, "of_those": 1.0},
    }
    dead, *others = first["latents"]
    assert dead["twin"] == {"id": there[dead["id"]], "fired": 0, "cosine": 1.0}
    for latent in others:
        twin = latent["twin"]
        assert (twin["id"], twin["cosine"]) == (there[latent["id"]], 1.0)
        # The dead one's place in rows goes to others, so that they may fire on more.
        assert twin["fired"] >= latent["fired"] and twin["promoted"] == latent["promoted"]
        assert twin["top"][0]["t"] == latent["top"][0]["t"]
        assert twin["largest"] == pytest.approx(latent["largest"], rel=1e-2)
        assert {n for n, cosine in twin["neighbours"]} == {
            there[n] for n, cosine in latent["neighbours"]
        }


def test_twins_are_of_the_same_module(demo_run: Path, tmp_path: Path) -> None:
    """Coders of no hookpoint here, or of other widths, are refused by name."""
    SparseCoder(192, SaeConfig(num_latents=24, k=2)).save_to_disk(tmp_path / "a/layers.5")
    SparseCoder(8, SaeConfig(num_latents=24, k=2)).save_to_disk(tmp_path / "b/layers.1")
    for folder, why in (
        ("a", "has coders of layers.5, and none of layers.1, layers.2.mlp"),
        ("b", "layers.1 goes from 8 to 8, and layers.1 from 192 to 192"),
    ):
        with pytest.raises(UsageError, match=f"--twins .*{why}"):
            page_data(FeaturesConfig(str(demo_run), twins=str(tmp_path / folder)))


def test_tensorboard_has_the_contexts_and_norms(written: Path, demo_run: Path) -> None:
    """TensorBoard gets top contexts as text, without markup, and histograms of decoder norms."""
    events = EventAccumulator(str(demo_run / "tensorboard/features")).Reload()
    tag = "top_contexts/layers.1/text_summary"
    text = events.Tensors(tag)[0].tensor_proto.string_val[0].decode()
    assert "**latent" in text and "<" not in text
    main = next(
        f.parent for f in (demo_run / "tensorboard").rglob("events*") if f.parent.name != "features"
    )
    tags = EventAccumulator(str(main)).Reload().Tags()["histograms"]
    assert {"decoder_norm/layers.1", "log10_firing_frequency/layers.1"} <= set(tags)


def dom(file: Path, *, whole: bool = False, **state: Any) -> str:
    """The page, or what its script drew, as elements that a browser ended up with."""
    assert BROWSER is not None
    command = [
        *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
        *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
        *(f"--user-data-dir={file.parent / 'browser'}", "--virtual-time-budget=3000"),
        *("--dump-dom", f"file://{file}#{urlencode(state)}"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    main = re.search(r'<main id="page">(.*?)</main>', done.stdout, re.S)
    assert main is not None
    return done.stdout if whole else main[1]


def listed(shown: str) -> list[int]:
    return [int(n) for n in re.findall(r"latent=(\d+)[^>]*><b>\d+</b>", shown)]


@pytest.mark.skipif(BROWSER is None, reason="needs chromium on the PATH")
def test_page_in_a_browser(written: Path) -> None:
    """It draws itself, text of the data stays text, and find, sort and choice do what they say."""
    shown = dom(written, find="<script", coder="layers.1")
    elements = re.sub(r' title="[^"]*"', "", shown)
    assert "<script" not in elements and "<img" not in elements and "&lt;" in elements
    assert "<title>run \u2013 features</title>" in dom(written, whole=True)
    assert shown.count('class="card curve"') == 2 and shown.count("<rect") == 24
    data = re.search(r'id="data">(.*?)</script>', written.read_text(), re.S)
    assert data is not None
    coder = json.loads(data[1])["coders"][1]
    by_largest = sorted(coder["latents"], key=lambda latent: -latent["largest"])
    shown = dom(written, coder="layers.2.mlp", sort="largest")
    assert listed(shown) == [latent["id"] for latent in by_largest]
    assert f"layers.2.mlp, latent {by_largest[0]['id']}<" in shown
    some = by_largest[7]["id"]
    shown = dom(written, coder="layers.2.mlp", latent=some)
    assert f"layers.2.mlp, latent {some}<" in shown and shown.count('class="context"') >= 2
    assert listed(dom(written, coder="layers.2.mlp", find=some))[0] == some
    shown = dom(written, find="no text has this")
    assert listed(shown) == [] and "No latent has that." in shown


@pytest.mark.skipif(BROWSER is None, reason="needs chromium on the PATH")
def test_twins_in_a_browser(
    twins_page: tuple[dict[str, Any], dict[int, int]], demo_run: Path
) -> None:
    """Both headings, the cosine, contexts of both; the list has the cosine and sorts by it."""
    (coder, _), there = twins_page[0]["coders"], twins_page[1]
    dead, latent = (entry["id"] for entry in coder["latents"][:2])
    page = demo_run.parent / "twins.html"
    shown = dom(page, coder="layers.1", latent=latent)
    assert f"layers.1, latent {latent}<" in shown
    assert f"others: layers.1, latent {there[latent]}<" in shown and "cosine 1.000" in shown
    one, both = (len(re.findall('class="context"', part)) for part in shown.split('class="twin"'))
    assert one > 1 and both > 1 and '<option value="twin">' in shown and "100% of them" in shown
    assert "It does not fire on this text." in dom(page, coder="layers.1", latent=dead)
    assert '<option value="twin">' not in dom(page, coder="layers.2.mlp")
