"""The commands, `python -m sae COMMAND ...`, called in the process of the tests."""

import signal

import pytest

import sae.__main__ as door


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of `python -m sae` with arguments; signals mean afterwards what they did."""
    monkeypatch.setattr("sys.argv", ["sae", *arguments])
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    handlers = [signal.getsignal(number) for number in numbers]
    try:
        door.main()
    except SystemExit as ended:
        assert isinstance(ended.code, int)
        return ended.code
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
    return 0
