"""The commands: python -m sae COMMAND ..."""

import difflib
import sys
from importlib import import_module
from typing import NamedTuple

import tyro

from .flag_checks import UsageError
from .placement.entry import run_as_script


class Command(NamedTuple):
    """A module with a config and a `main`; imported when it is asked for."""

    config: str
    about: str
    room: str = "judge"


COMMANDS = {
    "evaluate": Command("EvaluateConfig", "figures of trained coders on held-out text"),
    "features": Command("FeaturesConfig", "a page of what the latents stand for"),
    "compare": Command("CompareConfig", "runs side by side"),
    "threshold": Command("ThresholdConfig", "JumpReLU coders from trained ones"),
    "export": Command("ExportConfig", "coders in files for other programs", "share"),
    "push": Command("PushConfig", "a run's coders on the Hub, with a model card", "share"),
}


def usage() -> str:
    """The commands, a line each."""
    lines = [f"  {name:10}{command.about}" for name, command in COMMANDS.items()]
    head = "usage: python -m sae COMMAND ...    (python -m sae COMMAND --help for its flags)"
    return "\n".join([head, "", *lines])


def main() -> None:
    """Run the command that the command line names."""
    with run_as_script():
        name, *arguments = sys.argv[1:] or ["--help"]
        if name in ("-h", "--help"):
            print(usage())
            return
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            raise UsageError(
                f"{name}: no such command"
                + (f", did you mean {near[0]}?" if near else "")
                + f" There are {', '.join(COMMANDS)}"
            )
        module = import_module(f".{COMMANDS[name].room}.{name}", __package__)
        config = getattr(module, COMMANDS[name].config)
        cfg = tyro.cli(
            config,
            prog=f"python -m sae {name}",
            description=module.__doc__,
            args=arguments,
            use_underscores=True,
        )
        module.main(cfg)


if __name__ == "__main__":
    main()
