"""What the README says is so: its commands parse, its Python runs, its files exist."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tyro

from sae.compare import CompareConfig
from sae.evaluate import EvaluateConfig
from sae.features import FeaturesConfig
from train_sae import TrainConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


STEP_ROWS = {
    "step": "D = 384, L = 12288, k = 32",
    "step_wide": "D = 768, L = 24576, k = 64",
    "step_amx": "AMX: D = 384, L = 12288, k = 32",
    "step_wide_amx": "AMX: D = 768, L = 24576, k = 64",
}

COMMANDS: dict[str, Any] = {
    "sae.evaluate": EvaluateConfig,
    "sae.features": FeaturesConfig,
    "sae.compare": CompareConfig,
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def commands() -> list[str]:
    joined = "\n".join(blocks("bash")).replace("\\\n", " ")
    return [line.split(";")[0] for line in joined.splitlines() if line.strip()]


def test_commands_parse() -> None:
    """Every command of the README names files that exist and flags that the script takes."""
    seen = 0
    for command in commands():
        words = shlex.split(command)
        for word in words:
            if word.startswith(("scripts/", "accelerate_configs/", "benchmarks/")):
                assert (ROOT / word).is_file(), command
        if "train_sae.py" in words and "--help" not in words:
            arguments = words[words.index("train_sae.py") + 1 :]
            tyro.cli(TrainConfig, args=arguments, use_underscores=True)
            seen += 1
        for module, config in COMMANDS.items():
            if module in words:
                tyro.cli(config, args=words[words.index(module) + 1 :], use_underscores=True)
                seen += 1
    assert seen >= 9


def test_python_runs(tmp_path: Path) -> None:
    """The README's Python, top to bottom, in one session."""
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + "\n".join(blocks("python"))
    code += "\nassert list(coders) == ['layers.3'] and reconstruction.shape == x.shape"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr


def test_map_is_complete() -> None:
    """Every source file is on the map, and the map names no other."""
    named = set(re.findall(r"^(train_sae\.py|sae/\w+\.py) ", README, flags=re.M))
    files = {f"sae/{p.name}" for p in ROOT.glob("sae/*.py")} - {"sae/__init__.py"}
    assert named == files | {"train_sae.py"}
    assert (ROOT / "train_sae.py").read_text().count("# EDIT:") == 3


def test_numbers_are_those_of_the_checked_in_results() -> None:
    """The README's table of targets is what the command prints, its steps what the files say."""
    from benchmarks.targets import table

    files = ROOT.glob("benchmarks/results/*.json")
    results = {file.stem: json.loads(file.read_text()) for file in files}
    assert table(results) in README
    for name, shape in STEP_ROWS.items():
        for dtype in ("float32", "bfloat16"):
            found = results[name][dtype]
            cells = [f"{found[f'{of}_ms']:.0f}" for of in ("product", "product_in_place", "step")]
            assert f"| {shape}, {dtype} | {' | '.join(cells)} |" in README
    assert (ROOT / "docs/scaling.svg").is_file()


def test_exchange_numbers_are_the_checked_in_ones() -> None:
    """The README's tables of several processes say what the result file says, and it is minimal."""
    result = json.loads((ROOT / "benchmarks/results/exchange.json").read_text())
    shape = result["shape"]
    for world in (1, 2, 4):
        cells = [
            f"{found['received_bytes'] / 1e6:.1f} MB, {found['step_ms']:.0f} ms"
            for found in result[f"ranks_{world}"].values()
        ]
        assert f"| {world} | {' | '.join(cells)} |" in README
        others = shape["rows"] - shape["rows"] // world
        share = shape["hookpoints"] // world
        owners = result[f"ranks_{world}"]["owners"]
        assert owners["received_bytes"] == share * others * shape["D"] * 4
    for case in result["paper"]:
        row = f"| {case['hookpoints']} hookpoints | {case['gpus']} | {case['GB_per_gpu_total']:.1f}"
        assert row in README


def test_evaluation_is_the_checked_in_one() -> None:
    """The README's table and its gain from the KL loss are those of the result file."""
    result = json.loads((ROOT / "benchmarks/results/evaluate.json").read_text())
    for name, figures in result["quickstart"].items():
        predicted = figures.get("predictions", figures)
        cells = f"{predicted['ce_recovered']:.4f}  {predicted['kl']:.4f}"
        assert re.search(rf"^{name} .*{cells}  ", README, flags=re.M)
    before, after = (result[run]["layers.3"]["predictions"] for run in ("quickstart", "kl"))
    assert after["ce_recovered"] > before["ce_recovered"] and after["kl"] < before["kl"]
    for figure in ("ce_recovered", "kl"):
        said = rf"from\s{before[figure]:.4f}\sto\s{after[figure]:.4f}"
        assert re.search(said, README), figure


def test_faults_are_the_checked_in_ones() -> None:
    """The README's table of faults is the result file, and every safeguard has a red test."""
    for fault, found in json.loads((ROOT / "benchmarks/results/faults.json").read_text()).items():
        assert f"| {fault} | {found['outcome']} |" in README, fault
    removed = json.loads((ROOT / "benchmarks/results/removals.json").read_text())
    assert len(removed) >= 13 and all(removed.values())


def test_paper_is_computed_as_checked_in() -> None:
    """The extrapolation on paper comes out of the benchmark as it was checked in."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.exchange import paper

    checked_in = json.loads((ROOT / "benchmarks/results/exchange.json").read_text())["paper"]
    assert [paper(8, 8), paper(64, 80)] == checked_in


@pytest.mark.skipif(
    not (ROOT / ".venv/installed.txt").exists(), reason="scripts/test.sh makes .venv"
)
def test_quickstart(tmp_path: Path) -> None:
    """The quickstart, shortened, from another folder, twice: it trains and says where all is."""
    for _ in range(2):
        script = ROOT / "scripts/quickstart.sh"
        flags = [
            "--max_examples",
            "256",
            "--save_dir",
            str(tmp_path / "runs"),
            "--eval_tokens",
            "9000",
        ]
        done = subprocess.run(
            ["bash", str(script), *flags], cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
    runs = sorted((tmp_path / "runs").iterdir())
    assert len(runs) == 2
    for run in runs:
        summary = json.loads((run / "summary.json").read_text())
        assert list(summary["hookpoints"]) == ["layers.1", "layers.3", "layers.4.mlp"]
        for name, figures in summary["hookpoints"].items():
            assert f"{name:12}  {figures['fvu']:12.4f}" in done.stdout or run != runs[-1]
            assert figures["fvu"] < 0.6 and Path(figures["path"]).is_dir()
    bar = done.stderr.rsplit("\r", 1)[-1]
    assert "fvu 0." in bar and "tokens/s" in bar and "16/16" in bar
    assert (runs[-1] / "report.html").stat().st_size > 2**20
    for said in ("run  ", "TensorBoard  ", "coders  ", "summary  ", "features  "):
        assert said in done.stdout
