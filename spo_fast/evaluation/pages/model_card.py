"""The trained model for others: README.md of the run directory (the hub's model card), and the upload to the hub."""

from __future__ import annotations

import re
import shlex
from html import escape
from pathlib import Path

from spo_fast.config.errors import RunError
from spo_fast.config.methods import find_method
from spo_fast.data.files import write_atomically
from spo_fast.evaluation.pages.run_record import RunRecord, count_text, value
from spo_fast.evaluation.pictures import sheet_prompts

FILES = (
    *("pytorch_lora_weights.safetensors", "lora_kohya.safetensors", "unet/*"),
    *("README.md", "report.html", "samples/*.png", "config.yaml", "metrics.jsonl"),
)
"""What is uploaded; patterns under the run directory."""
PIPELINE_TAGS = {"sd15": "stable-diffusion", "sdxl": "stable-diffusion-xl", "toy": "stable-diffusion-xl"}

# ---------------------------------------------------------------------------------------------------- the card


def method_text(method: str) -> tuple[str, str]:
    """What the training was, and the sentence that names its paper, if it has one."""
    record = find_method(method)
    paper = "" if record.paper is None else f"Method: {record.paper.markdown()}"
    return record.about or record.name.upper(), paper


def write_card(run_dir: str | Path, repository: str | None = None) -> Path:
    """Write README.md from what the run left; `repository`: the hub id it will be loaded from, if any."""
    path = Path(run_dir) / "README.md"
    write_atomically(path, card(RunRecord.read(run_dir), repository))
    return path


def card(run: RunRecord, repository: str | None) -> str:
    """The model card: metadata for the hub, then Markdown."""
    from huggingface_hub import ModelCardData

    s = run.settings
    grids = [n for n in ("before", "after") if (run.run_dir / "samples" / f"{n}.png").is_file()]
    prompts = sheet_prompts(run.run_dir / "samples" / f"{grids[-1]}.png") if grids else []
    kind = "full fine-tuning of the UNet" if s["full_finetune"] else f"LoRA of rank {s['rank']}"
    method = find_method(s["method"])
    tags = ["text-to-image", "diffusers", PIPELINE_TAGS[s["model"]], method.name, *method.tags]
    data = ModelCardData(
        base_model=run.base_model if run.base_model and is_hub_id(run.base_model) else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=tags if s["full_finetune"] else [*tags, "lora"],
        # no license: that is for the owner of the weights to say
        widget=[{"text": prompt} for prompt in prompts] or None,
    )
    how, paper = method_text(s["method"])
    who = "a model that training did not ask" if method.on_pairs else "the model that training followed"
    what = f"{count_text(run.pairs, run.unit)} in {count_text(run.iterations, 'iteration')}"
    images = "\n\n".join(f"{name.capitalize()}:\n\n![{name}](samples/{name}.png)" for name in grids)
    rows = "\n".join(f"| {name} | {cell(new)} | {cell(old)} |" for name, (old, new) in run.changed().items())
    base = s.get("base_weights", "full")
    rounded = "" if base == "full" else f" Training was inexact: it computed with the base model rounded to {base}."
    table = f"| setting | this run | preset {s['model']} |\n|---|---|---|\n{rows}" if rows else "All as in the preset."
    return f"""---
{data.to_yaml()}
---

# {repository or run.run_dir.resolve().name}

{kind[0].upper() + kind[1:]}, trained on {run.base_model or "the toy model of spo_fast"} by {how} with spo_fast: {what}.

{paper}

## Use

```python
{run.loading(repository or str(run.run_dir))}
```
{"" if s["full_finetune"] else COMFY}
## Measured

{measured(run, len(prompts))}

{images}

{"Prompts:" if prompts else ""}

{chr(10).join(f"- {cell(prompt)}" for prompt in prompts)}

## Settings

{table}

All settings are in config.yaml, all numbers of the run in metrics.jsonl, curves and samples in report.html.

## Limitations

The score is the opinion of {who} ({", ".join(s["scorer"])}), not of people, on a handful of
prompts; a higher score can come with over-saturated colours and surplus texture. What the base model cannot draw, or
should not be used for, holds here as well.{rounded}
"""


COMFY = "\nComfyUI, A1111: `lora_kohya.safetensors`, strength 1.\n"


def measured(run: RunRecord, prompts: int) -> str:
    """The score before and after, by whom and of how many images."""
    if run.after is None:
        return "No validation score was measured."
    who = ", ".join(run.settings["scorer"])
    images = f"{prompts * run.settings['num_validation_images']} images ({prompts} prompts)"
    before = "not on record" if run.before is None else f"{run.before:.4g}"
    gain = "" if run.before is None else f" ({run.after - run.before:+.3g})"
    s = run.settings
    held_out = "".join(
        f"\n| {name} | {'not on record' if was is None else f'{was:.4g}'} | {now:.4g} |"
        for name, (was, now) in run.held_out.items()
    )
    table = f"\n\n| not trained on | before | after |\n|---|---|---|{held_out}" if held_out else ""
    signs = f"\n\nSigns of reward hacking in these images: {run.signs}." if run.signs else ""
    return (
        f"Mean score by {who}, {images} from the same noise, {s['num_steps']} DDIM steps, guidance "
        f"{s['guidance_scale']}: before {before}, after {run.after:.4g}{gain}.{table}{signs}"
    )


def cell(text: object) -> str:
    """Text that Markdown tables and lists leave as it is."""
    return re.sub(r"([\\`*_|\[\]#])", r"\\\1", escape(" ".join(value(text).split()), quote=False))


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
