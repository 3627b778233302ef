"""The lock on a run's folder, and file systems that have none."""

import errno
import fcntl
from pathlib import Path

import pytest

from sae.runs import lock as locks
from sae.runs.lock import lock, unlock


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said_in_one_line(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The run goes on, after one line; one that did not end in order is named in it."""

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    lock(tmp_path)
    (said,) = capsys.readouterr().out.splitlines()
    assert "no locks on this file system" in said and "did not end" not in said
    written = (tmp_path / "run.lock").read_text()
    monkeypatch.setattr(locks, "_locks", {})  # as after a SIGKILL
    lock(tmp_path)
    (said,) = capsys.readouterr().out.splitlines()
    assert "no locks on this file system" in said and f"({written} did" in said
    assert "void" not in said
    unlock(tmp_path)
    assert (tmp_path / "run.lock").read_text() == ""


def test_other_errors_of_a_lock_are_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fails is not taken for a file system without locks."""

    def fail(descriptor: int, operation: int) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="broken"):
        lock(tmp_path)
