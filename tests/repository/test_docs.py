"""The documentation is true: commands parse, Python runs, files exist, numbers are the measured."""

import importlib
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tyro

from sae.__main__ import COMMANDS
from sae.flag_checks import flags_of
from train_sae import TrainConfig

ROOT = Path(__file__).parents[2]
PAGES = {p.relative_to(ROOT).as_posix(): p.read_text() for p in sorted(ROOT.glob("docs/*.md"))}
PAGES["README.md"] = (ROOT / "README.md").read_text()
ARCHITECTURE = PAGES["docs/architecture.md"]

# Roots of what may be named in a page; the demo's text is made by the quickstart.
FOLDERS = "sae|tests|scripts|benchmarks|accelerate_configs|demo|docs"
MADE_LATER = "demo/text/"
# Flags of pytest, the benchmarks and accelerate; what tyro makes of ours; what is never recorded.
OTHER_FLAGS = {
    *("faults", "formats", "as", "paper", "help", "modes", "num_cpu_threads_per_process"),
    *("no-normalize_decoder", "hf_token"),
}

STEP_ROWS = {
    "step": "D = 384, L = 12288, k = 32",
    "step_wide": "D = 768, L = 24576, k = 64",
    "step_amx": "AMX: D = 384, L = 12288, k = 32",
    "step_wide_amx": "AMX: D = 768, L = 24576, k = 64",
}


def blocks(page: str, language: str) -> list[str]:
    """Fenced blocks of a page."""
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], flags=re.S)


def commands(page: str) -> list[list[str]]:
    """The commands of a page as words; of a loop, what it repeats."""
    joined = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    return [shlex.split(line.split(";")[0]) for line in joined.splitlines() if line.strip()]


def config_of(command: str) -> Any:
    """The config that a command of `python -m sae` parses into."""
    module = importlib.import_module(f"sae.{COMMANDS[command].room}.{command}")
    return getattr(module, COMMANDS[command].config)


def test_readme_is_short() -> None:
    """The landing page has fewer than 200 lines."""
    assert len(PAGES["README.md"].splitlines()) < 200


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page: str) -> None:
    """Every command names files that exist and flags that are taken."""
    flat = (tyro.conf.OmitArgPrefixes,)
    for words in commands(page):
        for word in words:
            if re.match(rf"({FOLDERS})/", word) and not word.startswith(MADE_LATER):
                assert (ROOT / word).exists(), words
        if "--help" in words:
            continue
        started = next((word for word in words if word in ("train_sae.py", "train-sae")), None)
        if started:
            arguments = words[words.index(started) + 1 :]
            tyro.cli(TrainConfig, args=arguments, use_underscores=True, config=flat)
        elif words[:3] == ["python", "-m", "sae"]:
            tyro.cli(config_of(words[3]), args=words[4:], use_underscores=True)
        else:
            assert words[0] in ("bash", "pip", "tensorboard"), words


def test_python_runs(tmp_path: Path) -> None:
    """The Python of each page runs from top to bottom in one session, as it stands there."""
    shown = {page: "\n".join(blocks(page, "python")) for page in PAGES}
    shown = {page: code for page, code in shown.items() if code}
    assert {"README.md", "docs/files.md"} <= shown.keys()
    for page in shown:
        (tmp_path / Path(page).stem).mkdir()
        (tmp_path / Path(page).stem / "demo").symlink_to(ROOT / "demo")
    # One process: most of the time is spent on imports.
    runner = (
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        f"for page, code in {shown!r}.items():\n"
        f"    os.chdir(os.path.join({str(tmp_path)!r}, os.path.basename(page)[:-3]))\n"
        "    names = {}\n"
        "    exec(compile(code, page, 'exec'), names)\n"
        "    if page == 'README.md':\n"
        "        assert list(names['coders']) == [f'layers.{i}' for i in range(6)]\n"
        "        assert names['reconstruction'].shape == names['x'].shape\n"
        "        assert names['latents'].top_acts.shape == (2, 10, 64)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", runner],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # threads that wait for each other are slow
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES)
def test_links_and_named_files_exist(page: str) -> None:
    """Relative links resolve, and files in the text exist."""
    text = PAGES[page]
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("https://"):
            assert (ROOT / page).parent.joinpath(target).exists(), target
    for named in re.findall(rf"`((?:{FOLDERS})/[\w./-]*)`", text):
        assert named.startswith(MADE_LATER) or (ROOT / named).exists(), named
    linked = {Path(t).stem for t in re.findall(r"\]\((docs/\w+\.md)\)", PAGES["README.md"])}
    assert page == "README.md" or Path(page).stem in linked, "the README does not link to it"


@pytest.mark.parametrize("page", PAGES)
def test_named_flags_exist(page: str) -> None:
    """Every flag in the text is one of the training or of a command."""
    known = {*flags_of(TrainConfig()), *OTHER_FLAGS}
    for command in COMMANDS:
        known |= set(config_of(command).__dataclass_fields__)
    for code in re.findall(r"`(--[^`]*)`", PAGES[page]):
        for flag in re.findall(r"(?:^|\s)--([\w-]+)", code):
            assert flag.removeprefix("no-") in known, f"{page}: --{flag}"


def test_named_functions_are_in_the_named_files() -> None:
    """Where architecture.md says a name is in a file, it is defined there."""
    pattern = r"((?:`\w+`(?: and |, )?)+) in `(\w[\w/]*\.py)`"
    found = re.findall(pattern, ARCHITECTURE)
    assert len(found) > 25
    for names, file in found:
        source = (ROOT / file).read_text()
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"^\s*(def|class) {name}\b|^{name} = |^{name}: ", source, re.M), (
                f"{name} is not in {file}"
            )


def test_architecture_names_every_file() -> None:
    """Every source file of sae/ has its line in architecture.md, and no other file has one."""
    named = re.findall(r"^(sae/[\w/]+\.\w+) +\S", ARCHITECTURE, flags=re.M)
    files = {
        path.relative_to(ROOT).as_posix()
        for path in ROOT.glob("sae/**/*")
        if path.suffix in (".py", ".c", ".h", ".html") and path.parent != ROOT / "sae"
        if path.name != "__init__.py"
    }
    files |= {path.relative_to(ROOT).as_posix() for path in ROOT.glob("sae/*.py")}
    assert sorted(named) == sorted(files)


def test_architecture_counts_the_blocks_to_edit() -> None:
    """The script has as many blocks marked EDIT as architecture.md says."""
    (said,) = re.findall(r"has\s(\d+)\sblocks\smarked\s`# EDIT`", ARCHITECTURE)
    assert (ROOT / "train_sae.py").read_text().count("# EDIT:") == int(said)


def test_architecture_allows_the_imports_that_are_allowed() -> None:
    """Its table of imports is the one that the sources are held to."""
    allowed = runpy.run_path(str(Path(__file__).with_name("test_source.py")))["ALLOWED"]
    table = ARCHITECTURE.split("| room | may import |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| `([\w.]+)` \| (.*) \|$", table, flags=re.M)
    said = {room: set(re.findall(r"`([\w.]+)`", others)) for room, others in rows}
    del said["train_sae.py"]
    assert said == allowed


def test_numbers_are_those_of_the_checked_in_results() -> None:
    """The table of targets is what the command prints, the steps what the files say."""
    from benchmarks.targets import table

    page = PAGES["docs/speed.md"]
    files = ROOT.glob("benchmarks/results/*.json")
    results = {file.stem: json.loads(file.read_text()) for file in files}
    assert table(results) in page
    for name, shape in STEP_ROWS.items():
        for dtype in ("float32", "bfloat16"):
            found = results[name][dtype]
            cells = [f"{found[f'{of}_ms']:.0f}" for of in ("product", "product_in_place", "step")]
            assert f"| {shape}, {dtype} | {' | '.join(cells)} |" in page
    assert "(scaling.svg)" in page and (ROOT / "docs/scaling.svg").is_file()


def test_gpu_numbers_are_the_checked_in_ones() -> None:
    """The table of steps on a GPU is the result file, in which nothing failed."""
    from benchmarks.roofline import GPUS, SHAPES, enough_rows, parts, table

    page = PAGES["docs/speed.md"]
    result = json.loads((ROOT / "benchmarks/results/gpu.json").read_text())
    assert table(result["steps"]) in page
    assert result["failures"] == [] and result["machine"]["device"] in page
    for shape in SHAPES:
        found = {part.name: part for part in parts(*shape)}
        n, d, latents, _ = shape
        assert found["product"].flops == 2 * n * d * latents
        assert found["update"].bytes == 10 * 4 * d * latents  # y, z and g read, y and z written
        assert 8_000 < enough_rows(shape, GPUS[0]) < 11_000


def test_exchange_numbers_are_the_checked_in_ones() -> None:
    """The tables of several processes say what the result file says, and it is minimal."""
    page = PAGES["docs/placement.md"]
    result = json.loads((ROOT / "benchmarks/results/exchange.json").read_text())
    shape = result["shape"]
    for world in (1, 2, 4):
        cells = [
            f"{found['received_bytes'] / 1e6:.1f} MB, {found['step_ms']:.0f} ms"
            for found in result[f"ranks_{world}"].values()
        ]
        assert f"| {world} | {' | '.join(cells)} |" in page
        others = shape["rows"] - shape["rows"] // world
        share = shape["hookpoints"] // world
        owners = result[f"ranks_{world}"]["owners"]
        assert owners["received_bytes"] == share * others * shape["D"] * 4
    for case in result["paper"]:
        row = f"| {case['hookpoints']} hookpoints | {case['gpus']} | {case['GB_per_gpu_total']:.1f}"
        assert row in page


def test_evaluation_is_the_checked_in_one() -> None:
    """The table of figures, what the quickstart prints, and the gain from KL are measured."""
    result = json.loads((ROOT / "benchmarks/results/evaluate.json").read_text())
    judging, losses = PAGES["docs/judging.md"], PAGES["docs/losses.md"]
    for name, figures in result["quickstart"].items():
        predicted = figures.get("predictions", figures)
        cells = f"{predicted['ce_recovered']:.4f}  {predicted['kl']:.4f}"
        assert re.search(rf"^{name} .*{cells}  ", judging, flags=re.M)
        if "fvu" in figures:
            said = rf"^{name} +{figures['fvu']:.4f} "
            assert re.search(said, judging, flags=re.M), name
            assert re.search(said, PAGES["README.md"], flags=re.M), name
    before, after = (result[run]["layers.3"]["predictions"] for run in ("kl_start", "kl"))
    assert after["ce_recovered"] > before["ce_recovered"] and after["kl"] < before["kl"]
    for figure in ("ce_recovered", "kl"):
        said = rf"from\s{before[figure]:.4f}\sto\s{after[figure]:.4f}"
        assert re.search(said, losses), figure


def test_comparison_is_the_checked_in_one() -> None:
    """The table beside the SAE that SAELens trained is what the command wrote."""
    found = json.loads((ROOT / "benchmarks/results/compare.json").read_text())
    page = PAGES["docs/judging.md"]
    for i, coder in enumerate(found["coders"], 1):
        predicted = coder["predictions"]
        cells = [f"{coder['fvu']:.4f}", f"{coder['l0']:.1f}", f"{coder['dead_share']:.2%}"]
        cells += [f"{predicted['ce_recovered']:.4f}", f"{predicted['kl']:.4f}"]
        names = [str(i), Path(coder["source"]).name, coder["name"], str(coder["latents"])]
        said = rf"^{' +'.join([*names, *cells])} "
        assert re.search(said, page, flags=re.M), said
    (twins,) = found["twins"]
    shares = f"{twins['of_a']:.1%} of 1 in 2, {twins['of_b']:.1%} of 2 in 1"
    assert f"latents with a twin: {shares}" in page


def test_faults_are_the_checked_in_ones() -> None:
    """The table of faults is the result file, and every safeguard has a red test."""
    page = PAGES["docs/robustness.md"]
    for fault, found in json.loads((ROOT / "benchmarks/results/faults.json").read_text()).items():
        assert f"| {fault} | {found['outcome']} |" in page, fault
    removed = json.loads((ROOT / "benchmarks/results/removals.json").read_text())
    assert len(removed) >= 13 and all(removed.values())


def test_paper_is_computed_as_checked_in() -> None:
    """The extrapolation on paper comes out of the benchmark as it was checked in."""
    from benchmarks.exchange import paper

    checked_in = json.loads((ROOT / "benchmarks/results/exchange.json").read_text())["paper"]
    assert [paper(8, 8), paper(64, 80)] == checked_in


def test_sharing_is_computed_and_measured_as_said() -> None:
    """The bytes of shared coders come out of the benchmark, and those over gloo are these."""
    from benchmarks.exchange import sharing, wide_paper

    page = PAGES["docs/placement.md"]
    result = json.loads((ROOT / "benchmarks/results/sharing.json").read_text())
    small, wide = sharing(4096, 2**20, 64, 8, 16_384), wide_paper()
    assert result["paper"] == [small, wide]
    a_row, a_step = small["bytes_a_row"], small["bytes_a_step"]["norms, by columns"]
    columns, latents = a_row["decoder by columns"], a_row["decoder by latents"]
    assert f"| columns, as here | {columns:,.0f} | {a_step:,.0f}, for norms" in page
    assert f"| latents | {latents:,.0f} | 0 |" in page
    assert f"{a_row['the row itself']:,.0f} bytes a row for the rows themselves" in page
    assert f"Above {a_step / (latents - columns):.0f} rows a step" in page
    rows, moved = wide["rows"], wide["bytes_a_row"]
    for figure in (
        f"{wide['GB_of_the_whole_coder']:,.0f} GB, of which each GPU holds "
        f"{wide['GB_per_gpu']['weights, gradients, momentum']:.1f}, and "
        f"{wide['GB_per_gpu_total']:.1f} with rows",
        f"{rows * moved['the row itself'] / 1e9:.2f} GB of rows",
        f"{rows * moved['decoder by columns'] / 1e9:.2f} GB of candidates",
        f"{wide['bytes_a_step']['norms, by columns'] / 1e9:.2f} GB of norms",
        f"step of {wide['seconds_per_step']:.1f} s",
    ):
        assert figure in " ".join(page.split()), figure
    shape = result["shape"]
    d, k, count = shape["D"], shape["k"], shape["hookpoints"]
    for world in (2, 4):
        found = result[f"ranks_{world}"]
        cells = [
            f"{f['received_bytes'] / 1e6:.1f} MB, {f['step_ms']:.0f} ms" for f in found.values()
        ]
        assert f"| {world} | {' | '.join(cells)} |" in page
        on_paper = sharing(d, shape["L"], k, world, shape["rows"])
        each = shape["rows"] * on_paper["bytes_a_row"]["decoder by columns"]
        each += on_paper["bytes_a_step"]["norms, by columns"]
        each += 2 * (world - 1) / world * (2 * d + 2) * 4  # b_dec on two ways, an error, a norm
        rows_of_others = shape["rows"] - shape["rows"] // world
        received = found["shared"]["received_bytes"] - count * rows_of_others * d * 4
        assert received == pytest.approx(count * each, rel=1e-6)


def test_decoders_cut_either_way_send_what_was_computed() -> None:
    """Over gloo each cut of a decoder sends its bytes on paper; the docs have what was measured."""
    from benchmarks.exchange import sharing

    result = json.loads((ROOT / "benchmarks/results/decoder_cut.json").read_text())
    paper, rows, said = sharing(**result["shape"]), result["shape"]["rows"], []
    for cut in ("columns", "latents"):
        moved = rows * paper["bytes_a_row"][f"decoder by {cut}"]
        moved += paper["bytes_a_step"].get(f"norms, by {cut}", 0)
        found = result[cut]
        assert found["received_bytes"] == moved
        said.append(
            f"{found['received_bytes'] / 1e6:.1f} MB and {found['step_ms']:.0f} ms by {cut}"
        )
    page = " ".join(PAGES["docs/placement.md"].split())
    assert f"{rows:,} rows take {', '.join(said)}" in page


def test_every_start_of_the_quickstart_has_a_name_of_its_own() -> None:
    """What the script gives as the run's name differs from one second to the next."""
    script = (ROOT / "scripts/quickstart.sh").read_text()
    (name,) = re.findall(r'--run_name ("quickstart-[^"]*")', script)
    names = set()
    for _ in range(2):
        names.add(subprocess.check_output(["bash", "-c", f"echo {name}"], text=True))
        time.sleep(1.1)
    assert len(names) == 2


@pytest.mark.skipif(
    not (ROOT / ".venv/installed.txt").exists(), reason="scripts/test.sh makes .venv"
)
def test_quickstart(tmp_path: Path) -> None:
    """The quickstart, shortened, from another folder: it trains and says where all is."""
    script, save_dir = ROOT / "scripts/quickstart.sh", tmp_path / "runs"
    flags = ["--max_examples", "256", "--save_dir", str(save_dir), "--eval_tokens", "9000"]
    done = subprocess.run(
        ["bash", str(script), *flags], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (run,) = save_dir.iterdir()
    assert re.fullmatch(r"quickstart-\d{8}-\d{6}", run.name)
    summary = json.loads((run / "summary.json").read_text())
    assert list(summary["hookpoints"]) == ["layers.1", "layers.3", "layers.4.mlp"]
    for name, figures in summary["hookpoints"].items():
        assert f"{name:12}  {figures['fvu']:12.4f}" in done.stdout
        assert figures["fvu"] < 0.6 and Path(figures["path"]).is_dir()
    bar = done.stderr.rsplit("\r", 1)[-1]
    assert "fvu 0." in bar and "tokens/s" in bar and "32/32" in bar
    assert (run / "report.html").stat().st_size > 2**20
    for said in ("run  ", "TensorBoard  ", "coders  ", "summary  ", "features  "):
        assert said in done.stdout
