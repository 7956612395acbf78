"""`python -m spo_fast.train_spm --model sdxl --pairs PATH`: trains a preference model on pairs of images.

Nothing heavy is imported before the files of the run are known to be there.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo_fast.config import command, errors, flags
from spo_fast.config.optional_packages import check_extras
from spo_fast.config.preference import PreferenceConfig
from spo_fast.config.presets import PREFERENCE_PRESETS
from spo_fast.config.recipes import latent_recipe, optimizer_rate
from spo_fast.evaluation.required_files import resolve

if TYPE_CHECKING:
    from spo_fast.training.preference_run import PreferenceRun

ABOUT = "Train a (step-aware) preference model on pairs of images."
EXAMPLES = [
    "--model sd15 --pairs pickapic/ --output_dir runs/spm",
    "--model sdxl --pairs pickapic/ --parameterisation latent",
    "--config runs/spm/config.yaml --resume_from_checkpoint latest",
]


def parse(arguments: list[str] | None = None) -> PreferenceConfig:
    """The resolved PreferenceConfig of a command line. Raises ValueError for settings that do not fit together."""
    parser = flags.build_parser(PREFERENCE_PRESETS, "python -m spo_fast.train_spm", ABOUT, EXAMPLES)

    def recipe(given: dict[str, Any], source: dict[str, Any]) -> dict[str, Any]:
        latent = latent_recipe(given) if source.get("parameterisation") == "latent" else {}
        return latent | optimizer_rate(given, source, latent)

    return flags.parse(parser, PREFERENCE_PRESETS, arguments, recipe)[0]


def needed_scorers(cfg: PreferenceConfig) -> dict[str, str | None]:
    """PickScore, if training starts from it or it gives the labels; CLIP, for SD-1.5's latent model."""
    starts = cfg.reward.init_path is None
    needed: dict[str, str | None] = {}
    if (starts and cfg.reward.parameterisation == "pixel") or cfg.pairs.relabel == "pickscore":
        needed["pickscore"] = cfg.pairs.pickscore_path
    if starts and cfg.reward.parameterisation == "latent" and cfg.model.model == "sd15":
        needed["text_projection"] = cfg.reward.text_projection_path
    return needed


def build(cfg: PreferenceConfig) -> PreferenceRun:
    """The run, once every file of it is there. Raises UsageError, FileNotFoundError, MissingFilesError."""
    if cfg.pairs.pairs is None:
        raise errors.UsageError("--pairs is needed: a parquet file or directory, a folder with a table, or a hub id.")
    check_extras(cfg.flat())
    paths = [cfg.reward.init_path, *(entry.split("=", 1)[1] for entry in cfg.run.compare_with)]
    for path in paths:
        if path is not None and not Path(path).exists():
            raise FileNotFoundError(f"{path} does not exist: give a preference model's file or directory.")
    resolved = resolve(cfg.model, needed_scorers(cfg))  # all that is missing is named before PyTorch is imported
    from spo_fast.models.unasked import import_networks

    import_networks()
    from spo_fast.training.preference_run import PreferenceRun

    return PreferenceRun(cfg, resolved)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    return command.main(lambda: build(parse(arguments)), arguments)


if __name__ == "__main__":
    sys.exit(main())
