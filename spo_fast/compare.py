"""`python -m spo_fast.compare --a base --b RUN`: report.html with pairs side by side, win rates, blind votes.

The pictures and scores are those of evaluate.py (made if they are not there); the page loads nothing from anywhere.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from spo_fast.config import command, flags
from spo_fast.config.errors import RunError
from spo_fast.config.evaluation import EvaluationConfig
from spo_fast.config.presets import EVALUATION_PRESETS
from spo_fast.evaluation.contenders import find_files, named, resolve_settings

ABOUT = "One page that compares pictures of up to six models: pairs, win rates, blind votes, signs of reward hacking."
EXAMPLES = [
    "--a base --b runs/toy --output_dir runs/toy-evaluation",
    "--a base --b runs/sdxl --c dpo=mhdang/dpo-sdxl-text2image-v1 --prompts parti",
]
LETTERS = "abcdef"


def parse(arguments: list[str] | None = None) -> tuple[EvaluationConfig, list[str], argparse.Namespace]:
    """(what to evaluate, the names of the sides, the flags of this command alone)."""
    parser = flags.build_parser(EVALUATION_PRESETS, "python -m spo_fast.compare", ABOUT, EXAMPLES)
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for one in (parser.add_argument_group("comparison"), own):
        for letter in LETTERS:
            text = "base, or what --lora takes" + (" (default: base)" if letter == "a" else "")
            one.add_argument(f"--{letter}", metavar="SIDE", help=text, default="base" if letter == "a" else None)
        one.add_argument("--votes", nargs="*", type=Path, default=[], help="exported votes to merge into a user study")
        one.add_argument("--num_shown", type=int, default=32, help="pictures of each side on the page (default: 32)")
    try:
        mine, rest = own.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        parser.error(str(error))
    if {"-h", "--help"} & set(rest):
        parser.parse_args(rest)
    given = [side for letter in LETTERS if (side := getattr(mine, letter)) is not None]
    names = ["base" if side == "base" else named(side)[0] for side in given]
    if len(given) < 2 or mine.num_shown < 1:
        parser.error("give two sides, such as --a base --b RUN, and a --num_shown of at least 1.")
    if len(set(names)) < len(names):
        parser.error(f"two sides are called {next(n for n in names if names.count(n) > 1)}: name them, as --b x=PATH.")
    if "--lora" in rest:
        parser.error("--lora is for spo_fast.evaluate; here sides are --a, --b, ...")
    bare = flags.build_parser(EVALUATION_PRESETS, "python -m spo_fast.compare", ABOUT, EXAMPLES)
    sides = [side for side in given if side != "base"]
    return resolve_settings(bare, [*rest, *(["--lora", *sides] if sides else [])]), names, mine


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns its exit status."""

    def work() -> None:
        cfg, names, mine = parse(arguments)
        if not cfg.metric.metric_names:
            raise RunError("no metric: give one or more by --metrics.")
        found = find_files(cfg)  # all of them, before anything heavy is imported
        from spo_fast.evaluation.evaluate import evaluate
        from spo_fast.evaluation.pages.comparison import Comparison, spread, write_comparison

        evaluation = evaluate(cfg, *found)
        by_name = {g.contender.name: g for g in evaluation.galleries}
        sides = [by_name[name] for name in names]
        print(write_comparison(Comparison(evaluation, sides, spread(len(sides[0].files), mine.num_shown)), mine.votes))

    return command.guarded(work, arguments)


if __name__ == "__main__":
    sys.exit(main())
