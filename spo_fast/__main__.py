"""`spo-fast train --model sdxl`, or `python -m spo_fast train ...`: every command of the package by one name."""

from __future__ import annotations

import importlib
import sys
from typing import NoReturn

from spo_fast.config import command
from spo_fast.config.errors import UsageError, did_you_mean

COMMANDS = {
    "train": ("spo_fast.train", "preference optimisation of a model: a LoRA from prompts"),
    "train-spm": ("spo_fast.train_spm", "a preference model, from labelled pairs"),
    "evaluate": ("spo_fast.evaluate", "pictures and scores of a model and of what was trained"),
    "compare": ("spo_fast.compare", "a page that shows them side by side, and counts votes"),
    "report": ("spo_fast.report", "report.html of a run"),
    "ops": ("spo_fast.ops.__main__", "which backend computes each operation here"),
}
USAGE = "usage: spo-fast COMMAND [--help] [flags]\n\n" + "".join(
    f"  {name:<11}{about}\n" for name, (_, about) in COMMANDS.items()
)


def main(arguments: list[str] | None = None) -> int:
    """Run a command with the arguments behind its name; returns its exit status."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if name not in COMMANDS:
        return command.guarded(lambda: _unknown(name), rest)
    status: int = importlib.import_module(COMMANDS[name][0]).main(rest)
    return status


def _unknown(name: str) -> None:
    known = ", ".join(COMMANDS)
    raise UsageError(f"spo-fast has no command {name!r:.60}, only {known}.{did_you_mean(name, COMMANDS)}")


def run() -> NoReturn:
    """The command `spo-fast`."""
    if "--dry_run" in sys.argv:
        command.leave(main())
    sys.exit(main())


if __name__ == "__main__":
    run()
