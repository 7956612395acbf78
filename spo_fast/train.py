"""`python -m spo_fast.train --model sdxl`: the command line. Flags over --config file over the model's preset.

Nothing heavy is imported before the files of the run are known to be there.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from spo_fast.config import command, errors, flags
from spo_fast.config.errors import RunError
from spo_fast.config.methods import check_read, find_method
from spo_fast.config.optional_packages import check_extras
from spo_fast.config.presets import PRESETS
from spo_fast.config.recipes import ETAS, MEMORY, RECIPES, optimizer_rate
from spo_fast.config.training import Config
from spo_fast.evaluation.required_files import resolve, run_paths
from spo_fast.models.files.lora_files import find_lora

if TYPE_CHECKING:
    from spo_fast.training.loop import Run

DRY_RUN = "--dry_run"
ABOUT = "Step-by-step preference optimisation of a text-to-image diffusion model."
EXAMPLES = [
    "--model toy --output_dir runs/toy",
    "--model sdxl --prompts my_prompts.txt --output_dir runs/sdxl",
    "--model sd15 --method dpo --pairs pickapic/ --output_dir runs/dpo",
    "--config runs/sdxl/config.yaml --resume_from_checkpoint latest",
]


def parse(arguments: list[str] | None = None) -> Config:
    """The resolved Config of a command line. Raises ValueError for settings that do not fit together."""
    flags.first(arguments, "method", find_method)  # one of the user's own has flags of its own
    parser = flags.build_parser(PRESETS, "python -m spo_fast.train", ABOUT, EXAMPLES)
    parser.add_argument(
        DRY_RUN,
        action="store_true",
        help="Print what the run would need and cost. Loads nothing, writes only counts (in ~/.cache/spo_fast).",
    )

    def recipe(given: dict[str, Any], source: dict[str, Any]) -> dict[str, Any]:
        method = find_method(source["method"]).defaults(given) if "method" in source and given["model"] else {}
        less_memory = MEMORY[source["memory"]](given) if source.get("memory") in MEMORY else {}
        sampler = source.get("sampler", method.get("sampler"))
        noise = {"eta": ETAS[sampler]} if sampler in ETAS and "eta" not in method else {}
        # of the two that name the first step the later one holds; a method's or a preset's is the earliest
        first: dict[str, None] = {}
        if given.get("branch_sigma") is not None and "branch_start" not in source:
            first = {"branch_start": None}
        elif source.get("branch_start") is not None and "branch_sigma" not in source:
            first = {"branch_sigma": None}
        own = method | first | RECIPES[source.get("recipe", "default")](given) | less_memory | noise
        return own | optimizer_rate(given, source, own)

    cfg, given, named = flags.parse(parser, PRESETS, arguments, recipe)
    check_read(cfg.objective.method, named)
    if find_method(cfg.objective.method).on_pairs and cfg.pairs.pairs is None:
        raise errors.UsageError(
            f"--method {cfg.objective.method} trains on --pairs: a parquet file or directory, a folder "
            "with a table, or a hub id."
        )
    if cfg.data.prompts is not None and "max_prompts" not in given:
        cfg = cfg.with_fields(max_prompts=None)  # the toy preset's limit is meant for the built-in list
    # a decay of .9 in a file says nothing: runs from before there was export_ema wrote it whatever the method
    asked = "ema_decay" in named or ("ema_decay" in given and cfg.objective.ema_decay != Config().objective.ema_decay)
    if asked and "export_ema" not in given and "ema_decay" not in find_method(cfg.objective.method).settings:
        cfg = cfg.with_fields(export_ema=True)
    return cfg


def build(cfg: Config) -> Run:
    """The run, once every file of it is there. Raises MissingFilesError, UsageError, RunError."""
    check_extras(cfg.flat())
    if cfg.adapter.lora_path is not None:
        find_lora(cfg.adapter.lora_path)
    # everything missing is named at once, before PyTorch is imported
    resolve(cfg.model, run_paths(cfg), cfg.sample.guidance_scale)
    from spo_fast.models.unasked import import_networks

    import_networks()
    from spo_fast.models.device import found_device, pick_device
    from spo_fast.training.loop import Run
    from spo_fast.training.plan.fit_memory import is_out_of_memory, out_of_memory

    try:
        return Run(cfg)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(out_of_memory(cfg, "load", found_device(pick_device(cfg.run.device)))) from error


def dry_run(cfg: Config) -> None:
    """Print what the run would need and cost."""
    with command.without_collections():
        from spo_fast.training.plan.dry_run import sections

        for number, section in enumerate(sections(cfg)):
            print(("\n" if number else "") + section, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    if DRY_RUN in words:
        return command.guarded(lambda: dry_run(parse(words)), words)
    return command.main(lambda: build(parse(arguments)), arguments)


if __name__ == "__main__":
    if DRY_RUN in sys.argv:
        command.leave(main())
    sys.exit(main())
