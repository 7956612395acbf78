"""All that a run's directory tells: settings, metrics, warnings, grids."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from spo_fast.config.methods import find_method
from spo_fast.config.presets import PRESETS
from spo_fast.config.training import DECIDES
from spo_fast.data.files import read_json
from spo_fast.evaluation.image_statistics import IMAGE_STATISTICS
from spo_fast.evaluation.pages.history import History
from spo_fast.evaluation.pictures import PROMPTS_FILE
from spo_fast.models.files.layout import scheduler_config
from spo_fast.models.files.lora_files import COMFYUI_FILE, KOHYA_FILE
from spo_fast.models.files.sources import DEFAULTS, Resolved

FLOW_PIPELINES = {  # and their transformers, by --model
    **dict.fromkeys(("sd35", "toy-flow"), ("StableDiffusion3Pipeline", "SD3Transformer2DModel")),
    "flux": ("FluxPipeline", "FluxTransformer2DModel"),
}

# ---------------------------------------------------------------------------------------------------- what a run left


@dataclass(frozen=True)
class RunRecord:
    """What a run directory says about its run."""

    run_dir: Path
    settings: dict[str, Any]  # config.yaml
    history: History  # of metrics.jsonl
    start: dict[str, float]  # field -> its value before training: validation score, held-out metrics, image statistics

    @classmethod
    def read(cls, run_dir: str | Path, history: History | None = None) -> RunRecord:
        """Raises FileNotFoundError or ValueError if the directory holds no run of spo_fast.train.

        history: of the run, by who has it already; None reads metrics.jsonl.
        """
        run_dir = Path(run_dir)
        if not (run_dir / "config.yaml").is_file():
            raise FileNotFoundError(f"{run_dir} holds no run: it has no config.yaml. Give a run's --output_dir.")
        try:
            settings = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"{run_dir / 'config.yaml'} cannot be read: {' '.join(str(error).split())}") from error
        if not isinstance(settings, dict) or "method" not in settings:
            raise ValueError(f"{run_dir} holds no run of spo_fast.train. Reports of other runs are not made here.")
        find_method(str(settings["method"]))  # one from outside the package has settings of its own
        metrics, before = run_dir / "metrics.jsonl", run_dir / "samples" / "before.json"
        return cls(
            run_dir,
            settings,
            read_history(metrics) if history is None else history,
            started(read_json(before)) if before.is_file() else {},
        )

    @property
    def before(self) -> float | None:
        """Validation score before training."""
        return self.start.get("validation_score")

    @property
    def held_out(self) -> dict[str, tuple[float | None, float]]:
        """Metric that was not trained on -> before training, and the latest."""
        fields = {field: self.history.latest(field) for field in self.history.columns if field.startswith("held_out_")}
        return {
            field.removeprefix("held_out_"): (self.start.get(field), now)
            for field, now in fields.items()
            if now is not None
        }

    @property
    def signs(self) -> str:
        """Of reward hacking, in the latest validation."""
        return self.history.signs

    @property
    def iterations(self) -> int:
        """Done so far, those before a resume from another directory included."""
        return self.history.iterations[-1] + 1 if len(self.history) else 0

    @property
    def pairs(self) -> int:
        """Terms trained on so far."""
        return self.history.pairs

    @property
    def seconds(self) -> float:
        """Time in all phases; unlike the clock it does not count what lies between a kill and a resume."""
        return self.history.milliseconds / 1000

    def curve(self, field: str) -> tuple[np.ndarray, np.ndarray]:
        """(iterations done, values) of the records that have the field; NaN where it was not finite."""
        x, y = self.history.curve(field)
        if field in self.start:
            x, y = np.insert(x, 0, 0.0), np.insert(y, 0, self.start[field])
        return x, y

    @property
    def validated(self) -> dict[int, float | None]:
        """Validation score by iterations done, 0 for before training; None where it was not finite."""
        return {int(x): finite(float(y)) for x, y in zip(*self.curve("validation_score"), strict=True)}

    @property
    def after(self) -> float | None:
        """The latest validation score of trained weights."""
        return next((s for done, s in reversed(self.validated.items()) if done > 0), None)

    def verdict(self) -> str:
        """One line: the score before and after, and what that took."""
        score = "No validation score yet"
        if self.after is not None:
            score = f"Validation score {self.after:.4g} (before training: not on record)"
            if self.before is not None:
                gain = self.after - self.before
                score = (
                    f"Validation score {self.before:.4g} before, {self.after:.4g} after ({gain:+.3g}{self.within()})"
                )
        took = f"{count_text(self.iterations, 'iteration')}, {duration(self.seconds)}"
        return f"{score}; {count_text(self.pairs, self.unit)} in {took}"

    def half_interval(self, field: str) -> float | None:
        """Half of the 95 % interval of the field's change since before training; None if it was not logged."""
        return self.history.latest(f"half_{field}")

    @property
    def intervals_of(self) -> str:
        """Of how many prompts and pictures they are; empty without any."""
        prompts, images = (int(self.history.latest(f"validation_{n}") or 0) for n in ("prompts", "images"))
        return f"{prompts} prompts, {count_text(images, 'picture')}" if prompts else ""

    def within(self) -> str:
        """The interval of the score's change, as the verdict says it."""
        half = self.half_interval("validation_score")
        return "" if half is None else f" ± {half:.2g}, 95 %, {self.intervals_of}"

    def changes(self) -> list[tuple[str, float, float, float | None]]:
        """(name, before training, latest, half of the change's 95 % interval) of the score and the held-out ones."""
        rows = (
            []
            if self.before is None or self.after is None
            else [("score", "validation_score", self.before, self.after)]
        )
        rows += [(m, f"held_out_{m}", was, now) for m, (was, now) in self.held_out.items() if was is not None]
        return [(name, was, now, self.half_interval(field)) for name, field, was, now in rows]

    @property
    def unit(self) -> str:
        """What a loss is of."""
        return find_method(self.settings["method"]).unit

    def changed(self) -> dict[str, tuple[Any, Any]]:
        """Settings that differ from the model's preset: name -> (preset's, this run's).

        Left out: paths of the run, and what the preset leaves to the device and the maths does not notice.
        """
        preset = PRESETS[self.settings["model"]]().flat()
        skip = {"output_dir", "resume_from_checkpoint", *(flag for flag in DECIDES if preset[flag] is None)}
        return {
            k: (preset.get(k), v) for k, v in self.settings.items() if k not in skip and (k, v) not in preset.items()
        }

    def warnings(self) -> list[str]:
        """What went wrong, each once by its last words, with how often and since when."""
        return [
            f"{w.text} (iteration {w.first}{f' and {w.times - 1} later, last {w.last}' if w.times > 1 else ''})"
            for w in self.history.warnings.values()
        ]

    @property
    def base_model(self) -> str | None:
        """Hub id or path of the diffusion model; None for the embedded toy."""
        default = DEFAULTS.get(self.settings["model"])
        path = self.settings["pretrained_model_name_or_path"]
        return path or (default.pretrained_model_name_or_path if default else None)

    @property
    def network(self) -> str:
        """What was trained of the model, as pages call it; its folder has the name in small letters."""
        return "transformer" if self.settings["model"] in FLOW_PIPELINES else "UNet"

    @property
    def steps(self) -> str:
        """What draws the validation's pictures: DDIM without noise, which of a flow is Euler's method."""
        return "Euler" if self.settings["model"] in FLOW_PIPELINES else "DDIM"

    @property
    def guidance(self) -> str:
        """Of these pictures, as pages say it."""
        s = self.settings
        if s["model"] != "flux":
            return str(s["guidance_scale"])
        told = s.get("embedded_guidance")
        shown = "as the pipeline has it" if told is None else f"{told} (embedded)"
        return f"{shown}, true guidance {s['guidance_scale']}" if s["guidance_scale"] > 1 else shown

    @property
    def file_elsewhere(self) -> str:
        """The LoRA for ComfyUI and its like."""
        return COMFYUI_FILE if self.settings["model"] in FLOW_PIPELINES else KOHYA_FILE

    def redraw(self, weights: str) -> str:
        """The command that draws the grids' pictures again, before and after training; `weights`: the run directory."""
        s, prompts = self.settings, f"{weights}/samples/{PROMPTS_FILE}"
        words = [
            "python",
            "-m",
            "spo_fast.evaluate",
            "--lora",
            weights,
            "--prompts",
            prompts,
            "--noise_of",
            "validation",
        ]
        words += ["--images_per_prompt", str(s["num_validation_images"]), "--seed", str(s["seed"])]
        return f"{shlex.join(words)} --metrics --output_dir redrawn"

    def loading(self, weights: str) -> str:
        """Python that draws with what was trained; `weights`: the run directory or a hub repository."""
        s = self.settings
        if s["model"] in FLOW_PIPELINES:
            return self._loading_flow(weights)
        base, weights = (
            json.dumps(name, ensure_ascii=False) for name in (self.base_model, weights)
        )  # as Python has it
        pipeline = "StableDiffusionPipeline" if s["model"] == "sd15" else "StableDiffusionXLPipeline"
        load = "from_single_file" if base.endswith('.safetensors"') else "from_pretrained"
        unet = s["full_finetune"]
        lines = ["import torch", f"from diffusers import {pipeline}" + (", UNet2DConditionModel" if unet else "")]
        if not self.base_model:
            base, lines = 'toy_files()["model"]', [*lines, "from spo_fast.models.files.toy import toy_files"]
        dtype, there = self._computed_in("torch.float16")
        lines += ["", f'settings = {{"torch_dtype": {dtype}}}']
        if unet:
            source = f'{weights}, subfolder="unet", torch_dtype={dtype}'
            lines += [f'settings["unet"] = UNet2DConditionModel.from_pretrained({source})']
        lines += [f"pipe = {pipeline}.{load}({base}, **settings){there}"]
        # a file's prediction type is taken for epsilon by diffusers
        if load == "from_single_file" and (predicted := self._file_prediction()) != "epsilon":
            lines += [
                "pipe.scheduler = type(pipe.scheduler).from_config(",
                f'    pipe.scheduler.config, prediction_type="{predicted}"',
                ")",
            ]
        if not unet:
            lines += [f"pipe.load_lora_weights({weights})"]
        draw = f"num_inference_steps={s['num_steps']}, guidance_scale={s['guidance_scale']}"
        lines += [f'image = pipe("a prompt", {draw}).images[0]']
        return "\n".join(lines)

    def _computed_in(self, dtype: str) -> tuple[str, str]:
        """Of a pipeline its type, and how it goes to a GPU, which the toy can do without."""
        return (dtype, '.to("cuda")') if self.base_model else ("torch.float32", "")

    def _loading_flow(self, weights: str) -> str:
        """A single file is the transformer alone; an SD3 without T5 is loaded by saying so.

        FluxPipeline's guidance_scale is what the network is told (3.5 unless given), its true_cfg_scale is ours.
        """
        s = self.settings
        pipeline, transformer = FLOW_PIPELINES[s["model"]]
        base = json.dumps(self.base_model, ensure_ascii=False)
        dtype, there = self._computed_in("torch.bfloat16" if s["model"] == "flux" else "torch.float16")
        lines = ["import torch", f"from diffusers import {pipeline}"]
        settings = [f'settings = {{"torch_dtype": {dtype}}}']
        if not self.base_model:
            base = 'toy_files(FLOW_WEIGHTS)["model"]'
            lines += ["from spo_fast.models.files.toy import FLOW_WEIGHTS, toy_files"]
        weights = json.dumps(weights, ensure_ascii=False)
        whole, single = s["full_finetune"], base.endswith('.safetensors"')
        own = f'subfolder="transformer", torch_dtype={dtype}'
        if whole or single:
            lines[1] += f", {transformer}"
        if whole:
            settings += [f'settings["transformer"] = {transformer}.from_pretrained({weights}, {own})']
        if single:
            rest = s.get("base_model_name_or_path") or DEFAULTS[s["model"]].pretrained_model_name_or_path
            file, base = base, json.dumps(rest, ensure_ascii=False)
            if not whole:
                loaded = f"{transformer}.from_single_file({file}, config={base}, {own})"
                settings += [f'settings["transformer"] = {loaded}']
        path = Path(str(self.base_model)).expanduser()
        if s["model"] != "flux" and (not self.base_model or (path.is_dir() and not (path / "text_encoder_3").is_dir())):
            settings += ["settings |= dict(text_encoder_3=None, tokenizer_3=None)"]
        lines += ["", *settings, f"pipe = {pipeline}.from_pretrained({base}, **settings){there}"]
        lines += [] if whole else [f"pipe.load_lora_weights({weights})"]
        told = {name: s[name] for name in ("height", "width") if s.get(name)}
        told["num_inference_steps"], told["guidance_scale"] = s["num_steps"], s["guidance_scale"]
        if s["model"] == "flux":
            told["guidance_scale"] = s.get("embedded_guidance")
            told |= {"negative_prompt": '""', "true_cfg_scale": s["guidance_scale"]} if s["guidance_scale"] > 1 else {}
        told["max_sequence_length"] = s.get("max_sequence_length")
        draw = ", ".join(f"{name}={value}" for name, value in told.items() if value is not None)
        return "\n".join([*lines, f'image = pipe("a prompt", {draw}).images[0]'])

    def _file_prediction(self) -> str:
        """What a single file's network predicts."""
        source = DEFAULTS.get(self.settings["model"], DEFAULTS["sdxl"])
        path = Path(str(self.base_model)).expanduser()
        config = scheduler_config(Resolved(source, path, None)) if path.is_file() else {}
        return config.get("prediction_type", "epsilon")


def count_text(n: int, what: str) -> str:
    """A number and what it counts, in the plural where it must be."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    minutes, s = divmod(round(seconds), 60)
    h, m = divmod(minutes, 60)
    return f"{h} h {m} min" if h else f"{m} min {s} s" if m else f"{s} s"


def started(before: dict[str, Any]) -> dict[str, float]:
    """samples/before.json as fields of the log."""
    means = {name: np.mean([np.nan if v is None else v for v in values]) for name, values in before["values"].items()}
    found = {
        f"held_out_{name}": float(mean) for name, mean in means.items() if name not in ("score", *IMAGE_STATISTICS)
    }
    found |= {f"look_{name}": 1.0 for name, mean in means.items() if name in IMAGE_STATISTICS and mean > 0}
    return {k: v for k, v in {"validation_score": before["score"], **found}.items() if v is not None}


def finite(value: float) -> float | None:
    """The value, or None of NaN and infinity."""
    return value if math.isfinite(value) else None


# ---- metrics.jsonl ---------------------------------------------------------------------------------------------------


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """All records of a metrics.jsonl; a torn last line (a run still writing, or killed) is left out."""
    records = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n")[:-1], 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not a record ({error}). Delete this line.") from error
    return records


def read_history(path: Path) -> History:
    """Of a metrics.jsonl; empty if there is none."""
    found = History()
    for record in read_metrics(path) if path.is_file() else ():
        found.add(record)
    return found
