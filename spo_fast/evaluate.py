"""`python -m spo_fast.evaluate --model sdxl --lora RUN`: pictures of one set of prompts from the same noise by the base
model and by what was trained, and their scores.

Everything is kept in output_dir as it is made, so that the same command goes on after a kill and ends with the same
numbers: <contender>/<prompt>-<image>.png, <contender>/scores-<metric>.json, results.json, results.md.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import sys
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo_fast import cli
from spo_fast.config import EvaluationConfig
from spo_fast.files import read_json, weight_files
from spo_fast.models import find_contender, metric_scorers, resolve
from spo_fast.models.sources import Missing, MissingFilesError
from spo_fast.presets import EVALUATION_PRESETS
from spo_fast.prompt_sets import geneval_records, prompt_files, read_prompts

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

ABOUT = "Scores of pictures drawn by a model and by what was trained of it, from the same noise."
EXAMPLES = [
    "--model toy --lora runs/toy --output_dir runs/toy-evaluation",
    "--model sdxl --lora runs/sdxl spo=SPO-Diffusion-Models/SPO-SDXL_4k-p_10ep_LoRA --prompts pickapic",
]
NOISE = 2**32 - 3  # the iteration whose noise the pictures start from: no other use gets there
OF_THE_RUN = (  # settings that a run's directory brings along, unless they are given
    *("model", "pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "revision", "variant"),
    *("height", "width", "num_steps", "guidance_scale"),
)


# ------------------------------------------------------------------------------------------------------- what to draw


@dataclass(frozen=True)
class Contender:
    name: str  # of its folder
    source: str  # as it was given
    kind: str  # base, lora or unet
    path: Path | None = None


def named(spec: str) -> tuple[str, str]:
    """ "mine=runs/a" -> ("mine", "runs/a"); a source alone is called by its last part."""
    if (m := re.fullmatch(r"(\w[\w.-]*)=(.+)", spec)) and not Path(spec).exists():
        return m[1], m[2]
    path = Path(os.path.abspath(os.path.expanduser(spec)))
    stem = path.parent.name if path.name == "pytorch_lora_weights.safetensors" else path.name
    return re.sub(r"[^\w.-]", "_", stem.removesuffix(".safetensors")) or "run", spec


def check_metrics(cfg: EvaluationConfig) -> list[str]:
    """The scorers among the metrics. Raises ValueError for a metric that is none, or not of this model."""
    names = cfg.metric.metric_names
    if "geneval" in names and not (cfg.pictures.prompts or "").startswith("geneval"):
        raise ValueError("metric geneval judges GenEval's own prompts: add --prompts geneval (or geneval=FILE).")
    return metric_scorers(names, cfg.model.model, "--metrics")


def find_files(cfg: EvaluationConfig) -> tuple[Any, list[Contender]]:
    """(paths of the model and the metrics, contenders), base first. Raises MissingFilesError naming all that lack."""
    missing: list[Missing] = []
    resolved = None
    try:
        resolved = resolve(cfg.model, cfg.metric.paths_of(check_metrics(cfg)))
    except MissingFilesError as error:
        missing += error.missing
    contenders = [Contender("base", "base", "base")]
    kind = "sd15" if cfg.model.model == "sd15" else "sdxl"
    for spec in cfg.pictures.lora:
        name, source = named(spec)
        if any(c.name.lower() == name.lower() for c in contenders):
            raise ValueError(f"two contenders would be called {name}. Name them: --lora a=PATH b=PATH (base is taken).")
        found = find_contender(source, kind, "--lora")
        if isinstance(found, Missing):
            missing.append(found)
        else:
            contenders.append(Contender(name, source, *found))
    if missing:
        raise MissingFilesError(missing)
    return resolved, contenders


@dataclass(frozen=True)
class Gallery:
    """Where the pictures of one contender are, in order of prompts."""

    contender: Contender
    folder: Path
    num_prompts: int
    images_per_prompt: int

    @property
    def files(self) -> list[Path]:
        per = self.images_per_prompt
        return [self.folder / f"{n // per:05d}-{n % per}.png" for n in range(self.num_prompts * per)]

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raises ValueError if the pictures that are there were drawn otherwise."""
        from spo_fast.checkpoint import write_atomically

        file = self.folder / "settings.json"
        if file.is_file():
            was = read_json(file)
            if odd := [name for name in settings if was.get(name) != settings[name]]:
                shown = ", ".join(f"{n}: {was.get(n)!s:.24} there, {settings[n]!s:.24} now" for n in odd)
                raise ValueError(f"{self.folder} holds pictures of other settings ({shown}). Use another --output_dir.")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(settings, indent=1) + "\n")

    def digest(self) -> str:
        whole = hashlib.sha256()
        for file in self.files:
            whole.update(hashlib.sha256(file.read_bytes()).digest())
        return whole.hexdigest()


def fingerprint(contender: Contender) -> str:
    from spo_fast.models.row_cache import fingerprint_files

    if contender.path is None:
        return ""
    folder = contender.path
    return fingerprint_files([folder] if folder.is_file() else sorted(p for p in folder.iterdir() if p.is_file()))


# --------------------------------------------------------------------------------------------------------- pictures


class Drawn:
    """What sample_latents asks of a policy."""

    def __init__(self, unet: Any, fused: bool) -> None:
        self.unet, self.fused = unet, fused

    def told(self, cond: Any, guided: bool) -> Any:
        from spo_fast.models.fuse import text_of
        from spo_fast.models.policy import inputs_of

        if not self.fused:
            return cond
        return replace(cond, text=text_of(self.unet, *inputs_of(self.unet, len(cond), cond, guided)))

    def predict(self, x_t: Tensor, t: Tensor, cond: Any, guided: bool) -> Any:
        from spo_fast.models.policy import denoise

        return denoise(self.unet, x_t, t, cond, guided)


def draw_all(cfg: EvaluationConfig, resolved: Any, galleries: list[Gallery], prompts: list[str], device: Any) -> None:
    """Make the pictures that are not there yet. The model is loaded only if one is missing."""
    todo = [g for g in galleries if not all(file.is_file() for file in g.files)]
    if not todo:
        return
    from spo_fast.engine import prepare_drawing
    from spo_fast.models.compiled import compile_network, keep_cache_in
    from spo_fast.models.diffusion import DiffusionModel
    from spo_fast.models.fuse import fuse
    from spo_fast.models.lora import apply_lora, read_file
    from spo_fast.models.sources import load_unet, load_unet_from

    out, c, engine = Path(cfg.pictures.output_dir), cfg.pictures, cfg.engine
    model = DiffusionModel(cfg.model, resolved, device, out / "prompt_cache")
    for contender in (gallery.contender for gallery in todo if gallery.contender.kind == "lora"):
        assert contender.path is not None
        read_file(contender.path, model.unet)  # one that does not fit is told before anything is drawn
    model.prompt_cache.ensure([*prompts, ""])
    if engine.fuse:
        fuse(model.vae)
    if engine.compile != "off":
        keep_cache_in(out)
        if hasattr(model.vae, "decoder"):
            compile_network(model.vae.decoder, str(engine.compile))
    # whole UNets last: they take the base model's place
    for gallery in sorted(todo, key=lambda g: g.contender.kind == "unet"):
        contender = gallery.contender
        if contender.kind == "unet":
            assert contender.path is not None
            model.unet = None
            model.unet = load_unet_from(contender.path, model.dtype).to(device)
        elif model.unet is None:
            model.unet = load_unet(resolved, model.dtype).to(device)
        if contender.kind == "lora":
            assert contender.path is not None
            print(f"{contender.name}: {apply_lora(contender.path, model.unet)}", flush=True)
        if engine.fuse:
            rows = c.images_at_once * (2 if c.guidance_scale > 1 else 1)
            tokens = model.tokenizers[0].model_max_length
            kernel = prepare_drawing(model.unet, engine, rows, model.latent_shape, tokens)
            print(f"{contender.name}: {kernel.words}: {kernel.reason}")
        draw(cfg, model, gallery, prompts)
        if engine.fuse or contender.kind == "lora":
            model.unet = None  # fused with what it wore, or changed for good: the next one starts from the file


def draw(cfg: EvaluationConfig, model: Any, gallery: Gallery, prompts: list[str]) -> None:
    """Plain DDIM (eta 0). A batch that lacks a picture is drawn whole: its numbers depend on its company."""
    import torch

    from spo_fast.noise import KeyedDraws
    from spo_fast.rollout import sample_latents

    c, files = cfg.pictures, gallery.files
    table, policy = model.table(c.num_steps, 0.0), Drawn(model.unet, bool(cfg.engine.fuse))
    for start in range(0, len(files), c.images_at_once):
        numbers = range(start, min(start + c.images_at_once, len(files)))
        if all(files[n].is_file() for n in numbers):
            continue
        drawn = list(numbers)
        if cfg.engine.compile != "off":  # a graph is for one size: a short last batch is filled up
            drawn += [start] * (c.images_at_once - len(drawn))
        part = [prompts[n // c.images_per_prompt] for n in drawn]
        draws = KeyedDraws(c.seed, NOISE, torch.tensor(drawn, device=model.device))
        x = draws.latents(model.latent_shape, model.latent_dtype)
        latents = sample_latents(policy, table, model.cond(part), c.guidance_scale, x)
        for at in range(0, len(drawn), cfg.model.images_per_decode):
            chunk = slice(at, at + cfg.model.images_per_decode)
            for n, pixels in zip(drawn[chunk], model.decode(latents[chunk]).float().cpu(), strict=True):
                if not files[n].is_file():
                    write_picture(files[n], pixels)
        print(f"{gallery.contender.name}: {numbers.stop} of {len(files)} pictures", flush=True)


def write_picture(file: Path, pixels: Tensor) -> None:  # (3, H, W) about [-1, 1]
    import torch
    from PIL import Image

    from spo_fast.checkpoint import write_atomically

    if not pixels.isfinite().all():
        raise ValueError(f"{file.name}: the picture is not finite, an fp16 overflow. Use --mixed_precision bf16 or no.")
    data = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    out = io.BytesIO()
    Image.fromarray(data.permute(1, 2, 0).numpy()).save(out, "png")
    write_atomically(file, out.getvalue())


def read_picture(file: Path) -> Tensor:  # (3, H, W) in [-1, 1]
    import numpy as np
    import torch
    from PIL import Image

    try:
        with Image.open(file) as image:
            data = np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"{file} is damaged ({error}). Delete it and run again: only its batch is drawn anew."
        ) from error
    return torch.from_numpy(data.copy()).permute(2, 0, 1).float() / 127.5 - 1


# ----------------------------------------------------------------------------------------------------------- scores


def wanted(cfg: EvaluationConfig) -> dict[str, dict[str, Any]]:
    """What GenEval looks for in the prompts' pictures."""
    return geneval_records(prompt_files(cfg.pictures.prompts or "geneval")[1][0])


def metric_of(
    name: str, cfg: EvaluationConfig, resolved: Any, device: torch.device
) -> Callable[[Tensor, list[str]], dict[str, Tensor]]:
    """See measure.Metric."""
    import torch

    from spo_fast.measure import make_metric
    from spo_fast.models.diffusion import DTYPES
    from spo_fast.models.sources import load_tokenizers

    tokenizer = load_tokenizers(resolved)[0]

    def tokenize(texts: list[str]) -> Tensor:
        ids = tokenizer(list(texts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True)
        return torch.tensor(ids.input_ids)

    asked = wanted(cfg) if name == "geneval" else None
    return make_metric(name, resolved.scorer_paths, tokenize, device, DTYPES[cfg.metric.scorer_dtype], asked)


def score_all(
    cfg: EvaluationConfig, resolved: Any, galleries: list[Gallery], prompts: list[str], device: torch.device
) -> dict[str, dict[str, np.ndarray]]:
    """Contender -> metric (or look) -> (P,) means over each prompt's pictures. Kept per contender and metric."""
    import numpy as np
    import torch

    from spo_fast.checkpoint import write_atomically
    from spo_fast.models.row_cache import fingerprint_files
    from spo_fast.preference_report import without_nan

    per, size = cfg.pictures.images_per_prompt, cfg.pictures.images_at_once
    found: dict[str, dict[str, np.ndarray]] = {g.contender.name: {} for g in galleries}
    asked = ""
    if "geneval" in cfg.metric.metric_names:  # what it looks for belongs to its scores
        asked = f" {hashlib.sha256(json.dumps(wanted(cfg)).encode()).hexdigest()}"
    for name in ("looks", *cfg.metric.metric_names):
        needed = [n for n in cfg.metric.paths_of([name]) if n in resolved.scorer_paths]
        paths = [resolved.scorer_paths[n] for n in needed]
        weights = fingerprint_files(
            f for p in paths for f in (weight_files(p) if p.is_file() else p.iterdir()) if f.is_file()
        )
        metric = None
        for gallery in galleries:
            file = gallery.folder / f"scores-{name}.json"
            key = f"{gallery.digest()} {weights} {cfg.metric.scorer_dtype}{asked if name == 'geneval' else ''}"
            kept = read_json(file) if file.is_file() else {}
            if kept.get("of") != key:
                metric = metric or metric_of(name, cfg, resolved, device)
                scores: dict[str, list[float]] = {}
                for start in range(0, len(gallery.files), size):
                    part = gallery.files[start : start + size]
                    pixels = torch.stack([read_picture(f) for f in part]).to(device)
                    texts = [prompts[n // per] for n in range(start, start + len(part))]
                    for what, values in metric(pixels, texts).items():
                        scores.setdefault(what, []).extend(values.double().tolist())
                kept = {"of": key, "scores": scores}
                write_atomically(file, json.dumps(without_nan(kept)) + "\n")
                print(f"{gallery.contender.name}: {name}", flush=True)
            for what, values in kept["scores"].items():
                whole = np.array(values, dtype=np.float64)  # None, a score that was not finite, becomes NaN
                found[gallery.contender.name][what] = whole.reshape(len(prompts), per).mean(1)
    return found


def prompt_weights(cfg: EvaluationConfig, prompts: list[str]) -> dict[str, np.ndarray]:
    """Metric -> (P,) what a prompt counts in its mean, where not all count alike: GenEval means its tasks' means."""
    import numpy as np

    if "geneval" not in cfg.metric.metric_names:
        return {}
    from spo_fast.scorers.geneval import task_weights

    asked = wanted(cfg)
    return {"geneval": np.array(task_weights([asked[prompt]["tag"] for prompt in prompts]))}


# ---------------------------------------------------------------------------------------------------------- results


@dataclass(frozen=True)
class Evaluation:
    """What was drawn and how it was judged."""

    cfg: EvaluationConfig
    prompts: list[str]
    galleries: list[Gallery]
    raw: dict[str, dict[str, np.ndarray]]  # contender -> metric or look -> (P,)
    values: dict[str, dict[str, np.ndarray]]  # the same, times what a prompt counts: their mean is the score
    result: dict[str, Any]  # results.json

    @property
    def metrics(self) -> list[str]:
        return self.cfg.metric.metric_names


def summarised(values: Mapping[str, Mapping[str, np.ndarray]], names: list[str], seed: int) -> dict[str, Any]:
    """Contender -> name -> mean with its interval; beside the base also the paired gain and the share of wins."""
    from spo_fast.measure import bootstrap, win_rate

    base, out = values["base"], {}
    for contender, scores in values.items():
        rows: dict[str, Any] = {}
        for name in names:
            rows[name] = bootstrap(scores[name], seed)._asdict()
            if contender != "base":
                rows[name]["gain"] = bootstrap(scores[name] - base[name], seed)._asdict()
                rows[name]["win_rate"] = win_rate(scores[name], base[name], seed)._asdict()
        out[contender] = rows
    return out


def table(result: Mapping[str, Any], model: str, metrics: list[str]) -> str:
    """Markdown: a row a contender, its gain over the base, and the published rows."""
    from spo_fast.measure import PUBLISHED, Interval
    from spo_fast.preference_report import markdown

    def shown(row: Mapping[str, Any]) -> str:
        return str(Interval(row["mean"], row["low"], row["high"]))

    rows = [["", *metrics]]
    for name, scores in result["scores"].items():
        rows.append([name, *(shown(scores[m]) for m in metrics)])
        if name != "base":
            rows.append([f"{name} - base, paired", *(shown(scores[m]["gain"]) for m in metrics)])
            rows.append([f"{name} wins against base", *(shown(scores[m]["win_rate"]) for m in metrics)])
    for name, known in PUBLISHED.get(model, {}).items():
        if set(known) & set(metrics):
            rows.append([f"{name} (published)", *(f"{known[m]:.4g}" if m in known else "" for m in metrics)])
    return markdown(rows)


def decided(cfg: EvaluationConfig, device: torch.device) -> tuple[EvaluationConfig, list[Any]]:
    """cfg with what it leaves to the device filled in as a training fills it in, and why."""
    from spo_fast.choices import choose, found_device
    from spo_fast.config import Config, EngineConfig

    asked = {f.name: getattr(cfg.engine, f.name) for f in fields(cfg.engine)}
    training = Config(model=cfg.model, engine=EngineConfig(**asked))
    resolved, choices = choose(training, replace(found_device(device), memory_bytes=None))
    names = ("mixed_precision", "compile", "fuse")
    filled = cfg.with_fields(**{name: resolved.flat()[name] for name in names})
    return filled, [choice for choice in choices if choice.flag in names]


def evaluate(cfg: EvaluationConfig) -> Evaluation:
    """Draw, score, and write results.json and results.md. Raises before anything is drawn if something is missing."""
    resolved, contenders = find_files(cfg)
    prompts, set_name = load(cfg)
    import torch

    from spo_fast import checkpoint
    from spo_fast.choices import found_device, listed, pick_device
    from spo_fast.measure import LOOKS, hacking_signs
    from spo_fast.models.contenders import check_unet
    from spo_fast.models.row_cache import fingerprint_files
    from spo_fast.models.sources import load_tokenizers, text_files, unet_files, vae_files
    from spo_fast.models.text import count_truncated
    from spo_fast.preference_report import without_nan

    device = pick_device(cfg.pictures.device)
    cfg, choices = decided(cfg, device)
    if choices:
        print(f"chosen for this device ({found_device(device).name}):\n{textwrap.indent(listed(choices), '  ')}")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = cfg.model.allow_tf32
    out, c = Path(cfg.pictures.output_dir), cfg.pictures
    differ = {c.name: check_unet(c.path, resolved) for c in contenders if c.kind == "unet" and c.path is not None}
    for name, found in differ.items():
        if any(found):
            print(f"{name}: {found}")
    held = checkpoint.lock(out)
    tokenizer = load_tokenizers(resolved)[0]
    if cut := count_truncated(tokenizer, prompts):
        print(f"warning: prompts longer than {tokenizer.model_max_length} tokens: {cut}; what lies beyond is not read.")
    settings = {
        "model": fingerprint_files([*unet_files(resolved), *vae_files(resolved), *text_files(resolved)]),
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        "sampler": "DDIM, eta 0",
        **{name: getattr(cfg.model, name) for name in ("mixed_precision", "height", "width")},
        **{name: getattr(cfg.engine, name) for name in ("compile", "fuse", "attention")},
        **{name: getattr(c, name) for name in ("images_per_prompt", "num_steps", "guidance_scale", "seed")},
    }
    galleries = [Gallery(one, out / one.name, len(prompts), c.images_per_prompt) for one in contenders]
    prints = {g.contender.name: fingerprint(g.contender) for g in galleries}
    for gallery in galleries:
        gallery.check({**settings, "contender": prints[gallery.contender.name]})
    draw_all(cfg, resolved, galleries, prompts, device)
    raw, weights = score_all(cfg, resolved, galleries, prompts, device), prompt_weights(cfg, prompts)
    values = {name: {m: v * weights.get(m, 1.0) for m, v in found.items()} for name, found in raw.items()}
    scores, seen = (summarised(values, list(names), c.seed) for names in (cfg.metric.metric_names, LOOKS))
    result = {
        "settings": {**settings, **cfg.flat()},
        "versions": checkpoint.versions(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "prompts": {"from": set_name, "count": len(prompts), "truncated": cut},
        "contenders": {g.contender.name: {"source": g.contender.source, "kind": g.contender.kind,
                                          "fingerprint": prints[g.contender.name]} for g in galleries},
        "differences": {name: found._asdict() for name, found in differ.items()},
        "scores": scores,
        "looks": seen,
        "hacking": {n: hacking_signs(values["base"], v, c.seed) for n, v in values.items() if n != "base"},
    }  # fmt: skip
    checkpoint.write_atomically(out / "results.json", json.dumps(without_nan(result), indent=1) + "\n")
    checkpoint.write_atomically(out / "results.md", page(result, cfg, len(prompts)))
    held.close()
    return Evaluation(cfg, prompts, galleries, raw, values, result)


def page(result: Mapping[str, Any], cfg: EvaluationConfig, num_prompts: int) -> str:
    c = cfg.pictures
    signs = [f"- {name}: {text}" for name, found in result["hacking"].items() for text in found.values()]
    lines = [
        table(result, cfg.model.model, cfg.metric.metric_names),
        "",
        f"{num_prompts} prompts ({result['prompts']['from']}), {c.images_per_prompt} pictures each, {c.num_steps} DDIM "
        f"steps, guidance {c.guidance_scale:g}, seed {c.seed}; means with 95 % bootstrap intervals over prompts. Rows "
        "marked published are their authors' numbers (Pick-a-Pic's 500 validation prompts), not measured here.",
        *(["", "Signs of reward hacking:", "", *signs] if signs else []),
    ]
    return "\n".join(lines) + "\n"


def load(cfg: EvaluationConfig) -> tuple[list[str], str]:
    """(prompts, what they are)."""
    c = cfg.pictures
    if c.prompts is None and cfg.model.model == "toy":
        from spo_fast.toy import world

        texts, name = world.TEST, "the toy's test prompts"
    elif c.prompts is None:
        from spo_fast.data import load_prompts

        texts, name = load_prompts(None), "built-in list"
    else:
        known, files = prompt_files(c.prompts)
        texts = read_prompts(known, files, c.caption_column)
        name = known.what if known else files[0].name
    return texts[: c.max_prompts], name


# ----------------------------------------------------------------------------------------------------- command line


def settings_of_run(sources: list[str]) -> dict[str, Any]:
    """What the first source that is a run of spo_fast.train was trained with, as far as drawing goes."""
    import yaml

    for source in sources:
        file = Path(os.path.expanduser(named(source)[1])) / "config.yaml"
        if file.is_file():
            try:
                saved = yaml.safe_load(file.read_text(encoding="utf-8"))
            except (UnicodeDecodeError, yaml.YAMLError) as error:
                raise ValueError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
            if isinstance(saved, dict) and "method" in saved:
                return {name: saved[name] for name in OF_THE_RUN if saved.get(name) is not None}
    return {}


def resolve_settings(parser: Any, arguments: list[str] | None) -> EvaluationConfig:
    def recipe(given: dict[str, Any], source: dict[str, Any]) -> dict[str, Any]:
        brought = settings_of_run(list(source.get("lora", ())))
        return brought if given.get("model") in (None, brought.get("model")) else {}

    return cli.parse(parser, EVALUATION_PRESETS, arguments, recipe)[0]


def parse(arguments: list[str] | None = None) -> EvaluationConfig:
    """The resolved settings. Raises ValueError for those that do not fit together."""
    parser = cli.build_parser(EVALUATION_PRESETS, "python -m spo_fast.evaluate", ABOUT, EXAMPLES)
    return resolve_settings(parser, arguments)


def main(arguments: list[str] | None = None) -> int:
    def work() -> None:
        evaluation = evaluate(parse(arguments))
        out = Path(evaluation.cfg.pictures.output_dir)
        print((out / "results.md").read_text(encoding="utf-8"))
        print(f"{out / 'results.json'}")

    return cli.guarded(work, arguments)


if __name__ == "__main__":
    sys.exit(main())
