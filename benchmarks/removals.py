"""Take each safeguard out in turn, and see which test notices.

    python benchmarks/removals.py --out benchmarks/results/removals.json

A test that stays green without what it guards proves nothing.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Removal(NamedTuple):
    """A safeguard, the lines of it in a file, what is left of them, and the tests to ask."""

    what: str
    file: str
    lines: str
    left: str
    tests: str


REMOVALS = [
    Removal(
        "the rename of a checkpoint that is whole",
        "sae/runs/checkpoint.py",
        'final, aside = run / f"step_{step}", run / f"step_{step}.tmp"',
        'final, aside = run / f"step_{step}.none", run / f"step_{step}"',
        "tests/runs/test_checkpoint.py tests/runs/test_faults.py",
    ),
    Removal(
        "the check of files against the manifest",
        "sae/runs/checkpoint.py",
        "if _digest(path) != digest:",
        "if False:",
        "tests/runs/test_checkpoint.py tests/runs/test_faults.py",
    ),
    Removal(
        "the ranks' agreement on signals",
        "sae/placement/ranks.py",
        "if self.world == 1 or not any(self.gather(reason is not None)):",
        "if True:",
        "tests/placement/test_interruptions.py",
    ),
    Removal(
        "the place in the order of the data, on resume",
        "train_sae.py",
        "plan.from_step(first_step)",
        "plan.from_step(0)",
        "tests/laws/test_resume_is_invisible.py",
    ),
    Removal(
        "the second rank's optimizer state, on resume",
        "sae/runs/checkpoint.py",
        "state.optimizers[name].load_state_tensors(tensors)",
        "ranks.rank or state.optimizers[name].load_state_tensors(tensors)",
        "tests/laws/test_placement_is_invisible.py",
    ),
    Removal(
        "the search for weights that the LM's files lack",
        "sae/lm/loading.py",
        "    if missing:\n",
        "    if False:\n",
        "tests/lm",
    ),
    Removal(
        "the lock on the run's folder",
        "sae/runs/lock.py",
        "fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "pass",
        "tests/runs/test_faults.py",
    ),
    Removal(
        "the skipping of bad steps",
        "train_sae.py",
        "if bad is None:",
        "if not (bad and bad_steps.skip(bad, step + 1, plan.first)):",  # counted, not skipped
        "tests/training/test_train.py",
    ),
    Removal(
        "the thread that sees a second ctrl-C",
        "sae/placement/signals.py",
        "if count == 2:",
        "if False:",
        "tests/runs/test_faults.py",
    ),
    Removal(
        "the blanking of the token in the process list",
        "sae/placement/entry.py",
        "    hide_tokens()\n",
        "",
        "tests/runs/test_faults.py",
    ),
    Removal(
        "the check for files that the run did not write",
        "sae/runs/checkpoint.py",
        "if path.is_file() and not known and",
        "if False and",
        "tests/runs/test_faults.py",
    ),
    Removal(
        "the check of tensor types and shapes before loading",
        "sae/formats/sparsify.py",
        "if shapes != expected:",
        "if False:",
        "tests/runs/test_hostile.py tests/coders/test_sparse_coder.py",
    ),
    Removal(
        "the survivors' look for lost ranks",
        "sae/placement/liveness.py",
        "    threading.Thread(target=_beat).start()\n",
        "",
        "tests/placement/test_interruptions.py",
    ),
]


def without(removal: Removal, text: str) -> str:
    """The text of the file without the safeguard, which must be in it once."""
    assert text.count(removal.lines) == 1, f"{removal.what}: not found once in {removal.file}"
    return text.replace(removal.lines, removal.left)


def first_red_test(removal: Removal) -> str | None:
    """The first test that fails without the safeguard."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(
            ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "checkpoints", "__pycache__")
        )
        file = copy / removal.file
        file.write_text(without(removal, file.read_text()))
        command = [sys.executable, "-m", "pytest", "-x", *removal.tests.split()]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=900)
    failed = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", done.stdout, flags=re.M)
    return failed[1] if failed else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = {}
    for removal in REMOVALS:
        found[removal.what] = first_red_test(removal)
        print(f"{removal.what:55} {found[removal.what] or 'NO TEST NOTICES'}", flush=True)
    if args.out:
        args.out.write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(None in found.values())


if __name__ == "__main__":
    main()
