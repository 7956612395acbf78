"""The trained model for others: README.md of the run directory (the hub's model card), and the upload to the hub."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from spo_fast.config.errors import RunError
from spo_fast.config.methods import Method, find_method
from spo_fast.data.files import write_atomically
from spo_fast.evaluation.pages.render import render
from spo_fast.evaluation.pages.run_record import RunRecord, count_text
from spo_fast.evaluation.pictures import sheet_prompts
from spo_fast.models.files.lora_files import COMFYUI_FILE, KOHYA_FILE, LORA_FILE

FILES = (
    *(LORA_FILE, KOHYA_FILE, COMFYUI_FILE, "unet/*", "transformer/*"),
    *("README.md", "report.html", "samples/*.png", "config.yaml", "metrics.jsonl"),
)
"""What is uploaded; patterns under the run directory."""
PIPELINE_TAGS = {
    "sd15": "stable-diffusion",
    **dict.fromkeys(("sdxl", "toy"), "stable-diffusion-xl"),
    **dict.fromkeys(("sd35", "toy-flow"), "stable-diffusion-3"),
    "flux": "flux",
}

# ---------------------------------------------------------------------------------------------------- the card


def write_card(run_dir: str | Path, repository: str | None = None) -> Path:
    """Write README.md from what the run left; `repository`: the hub id it will be loaded from, if any."""
    path = Path(run_dir) / "README.md"
    write_atomically(path, card(RunRecord.read(run_dir), repository))
    return path


def card(run: RunRecord, repository: str | None) -> str:
    """The model card: metadata for the hub, then Markdown."""
    s = run.settings
    grids = [n for n in ("before", "after") if (run.run_dir / "samples" / f"{n}.png").is_file()]
    prompts = sheet_prompts(run.run_dir / "samples" / f"{grids[-1]}.png") if grids else []
    method = find_method(s["method"])
    return render(
        "model_card.md",
        run=run,
        s=s,
        method=method,
        metadata=metadata(run, method, prompts),
        name=repository or run.run_dir.resolve().name,
        kind=f"Full fine-tuning of the {run.network}" if s["full_finetune"] else f"LoRA of rank {s['rank']}",
        how=method.about or method.name.upper(),
        paper=method.paper and method.paper.markdown(),
        done=f"{count_text(run.pairs, run.unit)} in {count_text(run.iterations, 'iteration')}",
        weights=repository or str(run.run_dir),
        grids=grids,
        prompts=prompts,
        changed=run.changed(),
        base_weights=s.get("base_weights", "full"),  # runs of before had no such setting
    )


def metadata(run: RunRecord, method: Method, prompts: list[str]) -> str:
    """What the hub reads, as YAML."""
    from huggingface_hub import ModelCardData

    s = run.settings
    tags = ["text-to-image", "diffusers", PIPELINE_TAGS[s["model"]], method.name, *method.tags]
    return ModelCardData(
        base_model=run.base_model if run.base_model and is_hub_id(run.base_model) else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=tags if s["full_finetune"] else [*tags, "lora"],
        # no license: that is for the owner of the weights to say
        widget=[{"text": prompt} for prompt in prompts] or None,
    ).to_yaml()


def is_hub_id(name: str) -> bool:
    """Whether a name is owner/name and no path of this machine."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


# ---------------------------------------------------------------------------------------------------- the hub


def claim_repository(name: str) -> str:
    """The full id of the repository to upload to, created if it is not there. Raises RunError if that cannot be."""
    from huggingface_hub import HfApi, get_token

    remedy = "Log in with `hf auth login` (a token that may write), or drop --push_to_hub."
    if get_token() is None:
        raise RunError(f"--push_to_hub finds no Hugging Face token. {remedy}")
    try:
        return HfApi().create_repo(name, exist_ok=True).repo_id
    except Exception as error:  # the hub's, its HTTP library's and the network's have no common class
        raise RunError(f"--push_to_hub cannot write to {name} ({one_line(error)}). {remedy}") from error


def upload(run_dir: Path, repository: str) -> str:
    """Upload FILES of a finished run; returns the address. Raises RunError with the command that repeats it."""
    from huggingface_hub import HfApi

    try:
        HfApi().upload_folder(
            repo_id=repository, folder_path=run_dir, allow_patterns=list(FILES), commit_message="Trained with spo_fast"
        )
    except Exception as error:
        raise RunError(
            f"the upload to {repository} failed ({one_line(error)}); everything is in {run_dir}. Repeat it with: "
            f"{upload_command(run_dir, repository)}"
        ) from error
    return f"https://huggingface.co/{repository}"


def upload_command(run_dir: Path, repository: str) -> str:
    """What uploads a run by hand."""
    import huggingface_hub

    # up to 0.x one --include took all patterns, since 1.0 each has its own
    each = int(huggingface_hub.__version__.split(".")[0]) >= 1
    patterns = [word for pattern in FILES for word in (["--include", pattern] if each else [pattern])]
    return shlex.join(["hf", "upload", repository, str(run_dir), ".", *([] if each else ["--include"]), *patterns])


def one_line(error: Exception) -> str:
    """An error's type and text."""
    return " ".join(f"{type(error).__name__}: {error}".split())
