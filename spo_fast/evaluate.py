"""`python -m spo_fast.evaluate --model sdxl --lora RUN`: pictures of one set of prompts from the same noise by the base
model and by what was trained, and their scores.

Everything is kept in output_dir as it is made, so that the same command goes on after a kill and ends with the same
numbers: <contender>/<prompt>-<image>.png, <contender>/scores-<metric>.json, results.json, results.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

from spo_fast.config import command, flags
from spo_fast.config.evaluation import EvaluationConfig
from spo_fast.config.presets import EVALUATION_PRESETS
from spo_fast.evaluation.contenders import find_files, resolve_settings

ABOUT = "Scores of pictures drawn by a model and by what was trained of it, from the same noise."
EXAMPLES = [
    "--model toy --lora runs/toy --output_dir runs/toy-evaluation",
    "--model sdxl --lora runs/sdxl spo=SPO-Diffusion-Models/SPO-SDXL_4k-p_10ep_LoRA --prompts pickapic",
]


def parse(arguments: list[str] | None = None) -> EvaluationConfig:
    """The resolved settings. Raises ValueError for those that do not fit together."""
    parser = flags.build_parser(EVALUATION_PRESETS, "python -m spo_fast.evaluate", ABOUT, EXAMPLES)
    return resolve_settings(parser, arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns its exit status."""

    def work() -> None:
        cfg = parse(arguments)
        found = find_files(cfg)  # all of them, before anything heavy is imported
        from spo_fast.models.unasked import import_networks

        import_networks()
        from spo_fast.evaluation.evaluate import evaluate

        evaluate(cfg, *found)
        out = Path(cfg.pictures.output_dir)
        print((out / "results.md").read_text(encoding="utf-8"))
        print(f"{out / 'results.json'}")

    return command.guarded(work, arguments)


if __name__ == "__main__":
    sys.exit(main())
