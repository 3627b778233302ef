"""What the latents of trained coders stand for: one page that opens from disk.

python -m sae features checkpoints/RUN --out report.html
python -m sae features CODERS --model gpt2 --dataset DATA --latents 500
python -m sae features checkpoints/RUN --twins OTHERS            each latent beside its twin
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator
from torch import Tensor
from torch.utils.tensorboard.writer import SummaryWriter
from transformers import PreTrainedModel

from ..coders.sparse_coder import SparseCoder
from ..data.tokenizing import load_tokenizer
from ..flag_checks import UsageError
from ..formats.origin import without_folder
from ..runs.json_files import check_target
from .compare import figures_of, summary_of
from .contexts import Contexts
from .figures import frequency_histogram
from .latents import Words, describe
from .threshold import of_coders
from .trained import CodersConfig, TrainedCoders, load_trained
from .twins import NEAR, Twins, beside_name, coders_beside, joined, nearest_twins

_CANDIDATES = 1024  # some of them never fire
_CURVES = ("fvu", "ce", "kl", "dead_share")
_NAMES = {"fvu": "FVU", "ce": "CE", "kl": "KL", "dead_share": "dead share"}
_NAMES |= {"ce_recovered": "CE recovered", "l0": "L0"}


@dataclass(frozen=True)
class FeaturesConfig(CodersConfig):
    """What to look at."""

    out: str = "report.html"
    """The page to write."""
    latents: int = 200
    """Latents of each coder to show, picked at random among those that fire."""
    ids: tuple[int, ...] = ()
    """Numbers of the latents to show instead."""
    twins: str | None = None
    """Other coders, as RUN_OR_PATH_OR_HUB_ID; beside each latent its nearest one there is shown."""
    prefix: int | None = None
    """Of coders with --matryoshka: look at the first so many latents alone, a prefix of theirs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.latents < 1:
            raise UsageError(f"--latents {self.latents}: must be 1 or more")


@torch.no_grad()
def find_contexts(
    trained: TrainedCoders, candidates: dict[str, Int[Tensor, " C"]]
) -> dict[str, Contexts]:
    """One pass over the tokens: by coder, how its latents fire, and where the candidates do."""
    capture, bank = trained.capture, trained.state.bank
    found = {n: Contexts(c.num_latents, candidates[n].to(c.device)) for n, c in bank.items()}
    for tokens in trained.source.batches(trained.blocks, 1):
        tokens = tokens.to(trained.lm.device)
        ids, rows = tokens.ids[0], capture.find(tokens)
        if tokens.attended is not None:  # padding is not shown as context either
            ids = ids.masked_fill(~tokens.attended[0], -1)
        for name, coder in bank.items():
            x, y, kept = rows[bank.hookpoint[name]]
            kept = torch.ones_like(ids, dtype=torch.bool) if kept is None else kept
            latents = coder.encode(x if coder.cfg.transcode else y)
            found[name].add_sequence(ids, kept, latents.top_acts, latents.top_indices)
    return found


def page_data(cfg: FeaturesConfig) -> dict[str, Any]:
    """All that the page shows, as JSON. Raises UsageError for what cannot be found or used."""
    trained = load_trained(cfg)
    if cfg.prefix is not None:
        trained = of_prefix(trained, cfg.prefix)
    bank = trained.state.bank
    candidates = {}
    for name, coder in bank.items():
        latents = coder.prefix or coder.num_latents
        if wrong := [i for i in cfg.ids if not 0 <= i < latents]:
            raise UsageError(f"--ids {wrong[0]}: {name} has latents 0 to {latents - 1}")
        order = torch.randperm(latents, generator=torch.Generator().manual_seed(0))
        some = order[: max(_CANDIDATES, 4 * cfg.latents)]
        candidates[name] = torch.tensor(list(dict.fromkeys(cfg.ids))) if cfg.ids else some
    beside = (
        coders_beside(trained, replace(cfg, coders=cfg.twins, prefix=None)) if cfg.twins else {}
    )
    nearest = {n: nearest_twins(bank[n], other.coder, candidates[n]) for n, other in beside.items()}
    kept = {beside_name(n): twins.latent.unique() for n, twins in nearest.items()}
    seen = find_contexts(joined(trained, beside), candidates | kept)
    words = Words(_tokenizer(trained))
    figures = {}
    if (Path(cfg.coders) / "summary.json").is_file():
        figures = figures_of(cfg.coders, cfg.prefix)
    coders = []
    for name, coder in bank.items():
        fired = seen[name].fired
        slots = [i for i, n in enumerate(candidates[name].tolist()) if fired[n] > 0]
        shown = slots[: None if cfg.ids else cfg.latents]
        hookpoint = bank.hookpoint[name]
        lm = trained.lm
        described = describe(lm, hookpoint, coder, seen[name], shown, words)
        shared = None
        if other := beside.get(name):
            near = Twins(nearest[name].cosine[shown], nearest[name].latent[shown])
            twins = _twins(lm, hookpoint, other.coder, seen[beside_name(name)], near, words)
            described = [own | {"twin": t} for own, t in zip(described, twins, strict=True)]
            shared = {"source": Path(str(cfg.twins)).name, "name": other.name, "near": NEAR}
            shared["of_these"] = nearest_twins(coder, other.coder).share(NEAR)
            shared["of_those"] = nearest_twins(other.coder, coder).share(NEAR)
        coders.append(
            {
                "name": name,
                "num_latents": coder.prefix or coder.num_latents,
                "k": coder.cfg.k,
                "rows": seen[name].rows,
                "alive": int((fired > 0).sum()),
                "chosen": bool(cfg.ids),
                "histogram": frequency_histogram(fired, seen[name].rows),
                "figures": {n: v for n, v in figures.get(name, {}).items() if v is not None},
                "latents": described,
                "twins": shared,
            }
        )
    tokens = len(trained.blocks) * trained.source.block_len
    read = f"{tokens:,} tokens of {without_folder(trained.data.dataset)}"
    whose = "Coders of" if cfg.prefix is None else f"The first {cfg.prefix:,} latents of coders of"
    return {
        "title": Path(cfg.coders).name,
        "about": f"{whose} {without_folder(trained.model.model)}, looked at on {read}.",
        "names": _NAMES,
        "vocabulary": words.texts,
        "curves": curves(Path(cfg.coders)),
        "coders": coders,
    }


def _twins(
    lm: PreTrainedModel,
    hookpoint: str,
    coder: SparseCoder,
    seen: Contexts,
    nearest: Twins,
    words: Words,
) -> list[dict[str, Any]]:
    """Twins with their cosines and all that there is to show; of one that never fires less."""
    numbers, slot = nearest.latent.tolist(), {n: i for i, n in enumerate(seen.latents.tolist())}
    alive = [slot[n] for n in dict.fromkeys(numbers) if seen.fired[n] > 0]
    described = describe(lm, hookpoint, coder, seen, alive, words) if alive else []
    found = {twin["id"]: twin for twin in described}
    cosines = [round(cosine, 3) for cosine in nearest.cosine.tolist()]
    return [
        {**found.get(n, {"id": n, "fired": 0}), "cosine": cosine}
        for n, cosine in zip(numbers, cosines, strict=True)
    ]


def of_prefix(trained: TrainedCoders, latents: int) -> TrainedCoders:
    """The same coders with their first latents alone. Raises UsageError where that is no prefix."""
    bank = trained.state.bank
    for name, coder in bank.items():
        if latents not in coder.prefixes:
            known = ", ".join(map(str, coder.prefixes)) or "none: train it with --matryoshka"
            raise UsageError(f"--prefix {latents}: the prefixes of {name} are {known}")
    return of_coders(trained, {name: coder.first(latents) for name, coder in bank.items()})


def _tokenizer(trained: TrainedCoders) -> Any:
    try:
        return load_tokenizer(trained.model.model, trained.model)
    except UsageError:  # an LM that was trained on token ids may have none, or a part of one
        return None


def curves(run: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """What TensorBoard holds of a run: metric -> coder -> (step, value), 300 of them at most."""
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for folder in sorted({file.parent for file in (run / "tensorboard").rglob("events.out.*")}):
        events = EventAccumulator(str(folder), size_guidance={SCALARS: 300}).Reload()
        for tag in events.Tags()["scalars"]:
            metric, _, coder = tag.partition("/")
            if metric in _CURVES:
                line = [(e.step, float(f"{e.value:.4g}")) for e in events.Scalars(tag)]
                found.setdefault(metric, {}).setdefault(coder or "all", []).extend(line)
    return {metric: found[metric] for metric in _CURVES if metric in found}


def page(found: dict[str, Any]) -> str:
    """The report as a page: nothing in it is fetched, and no text of the data is markup."""
    text = json.dumps(found, ensure_ascii=True, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    before, after = template.split("$DATA")
    return before + text + after


def write_tensorboard(run: Path, found: dict[str, Any], step: int, shown: int = 12) -> None:
    """The top contexts of some latents as text, beside the run's curves."""
    words = found["vocabulary"]
    with SummaryWriter(str(run / "tensorboard" / "features")) as writer:
        for coder in found["coders"]:
            parts = []
            for latent in coder["latents"][:shown]:
                parts.append(f"**latent {latent['id']}**, largest activation {latent['largest']}\n")
                parts += [f"- {_marked(example, words)}" for example in latent["top"][:3]]
                parts.append("")
            writer.add_text(f"top_contexts/{coder['name']}", "\n".join(parts), step)


def _marked(example: dict[str, Any], words: list[str]) -> str:
    """A context as Markdown, the token at the peak in bold."""
    texts = [_plain(words[number]) for number in example["t"]]
    peak = example["p"]
    return f"{''.join(texts[:peak])} **{texts[peak].strip()}** {''.join(texts[peak + 1 :])}"


def _plain(text: str) -> str:
    """Text without meaning for Markdown or HTML, on one line."""
    text = re.sub(r"\s", lambda space: {"\n": "\u21b5", "\t": "\u21e5"}.get(space[0], " "), text)
    return re.sub(r"[^\w\s]", lambda sign: f"&#{ord(sign[0])};", text)


def main(cfg: FeaturesConfig) -> None:
    """Write the page that the command line asks for."""
    out = Path(cfg.out)
    check_target("--out", out)
    found = page_data(cfg)
    out.write_text(page(found), encoding="utf-8")
    run = Path(cfg.coders)
    if cfg.prefix is None and (run / "summary.json").is_file():
        write_tensorboard(run, found, int(summary_of(cfg.coders)["step"]))
    print(f"features     {out.resolve()}")
