"""Laws of `python -m sae`, the one door to the commands."""

import subprocess
import sys
from pathlib import Path

import pytest
from command_runs import call

from sae.__main__ import COMMANDS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_help_lists_every_command_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, arguments: tuple[str, ...]
) -> None:
    """Each module with a `main` that can be asked for has one line, with what it is about."""
    assert call(monkeypatch, *arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("usage: python -m sae COMMAND")
    listed = [line.split(maxsplit=1) for line in lines[2:]]
    assert [name for name, _ in listed] == list(COMMANDS)
    assert all(about == COMMANDS[name].about for name, about in listed)
    modules = (ROOT / "sae").glob("*/*.py")
    with_main = {file.stem for file in modules if "\ndef main(" in file.read_text()}
    assert with_main == set(COMMANDS)


@pytest.mark.parametrize(
    ("given", "meant"), [("evalute", "evaluate"), ("feature", "features"), ("Compare", "compare")]
)
def test_an_unknown_command_is_refused_with_the_nearest_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, given: str, meant: str
) -> None:
    """An unknown command gives one line that names the nearest one, and exit code 2."""
    assert call(monkeypatch, given, "checkpoints/run") == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith(f"error: {given}: no such command, did you mean {meant}?")


def test_a_command_like_no_other_is_refused_with_all_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Where no name is near, the line lists all commands."""
    assert call(monkeypatch, "xyz") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "did you mean" not in line and line.endswith(", ".join(COMMANDS))


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("evaluate", ["--model", "--dataset", "--tokens", "--out"]),
        ("features", ["--latents", "--ids", "--out"]),
        ("compare", ["--near"]),
        ("threshold", ["--model", "--dataset", "--tokens", "--out"]),
        ("export", ["--to", "--out", "--hookpoint", "--allow_pt"]),
        ("push", ["--private", "--as", "--dry_run", "--license"]),
    ],
)
def test_help_of_a_command_shows_its_flags(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, name: str, flags: list[str]
) -> None:
    """python -m sae COMMAND --help names the command and every flag of its own."""
    assert call(monkeypatch, name, "--help") == 0
    printed = capsys.readouterr().out
    assert f"usage: python -m sae {name}" in printed
    assert all(flag in printed for flag in flags)


def test_commands_run_as_processes_of_their_own() -> None:
    """As a process of its own: help on one stream, an error on the other, exit codes 0 and 2."""
    python = [sys.executable, "-m", "sae"]
    asked = subprocess.run([*python, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert asked.returncode == 0 and "evaluate" in asked.stdout and asked.stderr == ""
    wrong = subprocess.run([*python, "evalute"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stdout == ""
    assert wrong.stderr.startswith("error: evalute: no such command, did you mean evaluate?")


def test_output_that_nobody_reads_to_its_end_is_no_traceback() -> None:
    """Behind a reader that stops, as `| head` does, a command ends without a traceback."""
    command = [sys.executable, "-m", "sae", "evaluate", "--help"]
    started = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert started.stdout is not None and started.stderr is not None
    started.stdout.close()
    said = started.stderr.read()
    assert started.wait(240) == 1 and "Traceback" not in said and "Exception" not in said, said
