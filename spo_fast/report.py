"""report.html: what a run did, in one file that loads nothing else. A run writes it at each validation and at its end.

`python -m spo_fast.report RUN_DIR` builds it again, also for a run that is still going or was killed: all it says is
read from config.yaml, metrics.jsonl and samples/.
"""

from __future__ import annotations

import argparse
import base64
import fnmatch
import io
import json
import math
import sys
from collections import Counter
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from spo_fast.checkpoint import write_atomically
from spo_fast.choices import DECIDES
from spo_fast.files import read_json
from spo_fast.measure import LOOKS, RISE
from spo_fast.metrics import read_metrics
from spo_fast.models.sources import DEFAULTS, Resolved, scheduler_config
from spo_fast.presets import DATA, PRESETS

MAX_POINTS = 300  # of a curve; more records are drawn as means of equal parts and a band from least to greatest
MAX_EPOCH_MARKS = 12
MAX_GRIDS_DURING = 4
MAX_PROMPTS = 16
STRIP_WIDTHS = (1600, 1200, 800, 500, 300)  # pixels across the images of a prompt; the first that fits is taken
MAX_IMAGE_BYTES = 6_500_000  # before base64, which adds a third: the whole report stays under 10 MB

# ---------------------------------------------------------------------------------------------------- what a run left


@dataclass(frozen=True)
class RunRecord:
    """What a run directory says about its run."""

    run_dir: Path
    settings: dict[str, Any]  # config.yaml
    records: list[dict[str, Any]]  # metrics.jsonl
    start: dict[str, float]  # field -> its value before training: validation score, held-out metrics, looks

    @classmethod
    def read(cls, run_dir: str | Path) -> RunRecord:
        """Raises FileNotFoundError or ValueError if the directory holds no run of spo_fast.train."""
        run_dir = Path(run_dir)
        if not (run_dir / "config.yaml").is_file():
            raise FileNotFoundError(f"{run_dir} holds no run: it has no config.yaml. Give a run's --output_dir.")
        try:
            settings = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"{run_dir / 'config.yaml'} cannot be read: {' '.join(str(error).split())}") from error
        if not isinstance(settings, dict) or "method" not in settings:
            raise ValueError(f"{run_dir} holds no run of spo_fast.train. Reports of other runs are not made here.")
        metrics, before = run_dir / "metrics.jsonl", run_dir / "samples" / "before.json"
        return cls(
            run_dir,
            settings,
            read_metrics(metrics) if metrics.is_file() else [],
            started(read_json(before)) if before.is_file() else {},
        )

    @property
    def before(self) -> float | None:
        """Validation score before training."""
        return self.start.get("validation_score")

    @property
    def held_out(self) -> dict[str, tuple[float | None, float]]:
        """Metric that was not trained on -> before training, and the latest."""
        fields = dict.fromkeys(f for r in self.records for f in r if f.startswith("held_out_") and r[f] is not None)
        latest = {field: next(r[field] for r in reversed(self.records) if r.get(field) is not None) for field in fields}
        return {field.removeprefix("held_out_"): (self.start.get(field), now) for field, now in latest.items()}

    @property
    def signs(self) -> str:
        """Of reward hacking, in the latest validation."""
        return next((r["hacking"] for r in reversed(self.records) if "hacking" in r), "")

    @property
    def iterations(self) -> int:
        """Done so far, those before a resume from another directory included."""
        return self.records[-1]["iteration"] + 1 if self.records else 0

    @property
    def pairs(self) -> int:
        return sum(r.get("pairs") or 0 for r in self.records)

    @property
    def seconds(self) -> float:
        """Time in all phases; unlike the clock it does not count what lies between a kill and a resume."""
        return sum(v for r in self.records for k, v in r.items() if k.endswith("_ms") and v is not None) / 1000

    def curve(self, field: str) -> tuple[np.ndarray, np.ndarray]:
        """(iterations done, values) of the records that have the field; NaN where it was not finite."""
        points = [(r["iteration"] + 1, math.nan if r[field] is None else r[field]) for r in self.records if field in r]
        if field in self.start:
            points.insert(0, (0, self.start[field]))
        x, y = np.array(points, dtype=float).reshape(-1, 2).T
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
                score = f"Validation score {self.before:.4g} before, {self.after:.4g} after ({gain:+.3g})"
        took = f"{count_text(self.iterations, 'iteration')}, {duration(self.seconds)}"
        return f"{score}; {count_text(self.pairs, self.unit)} in {took}"

    @property
    def unit(self) -> str:
        """What a loss is of."""
        return "loss term" if self.settings["method"] in ("ddpo", "dpok", "dense") else "pair"

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
        """What went wrong, each once, with how often and since when."""
        seen: list[tuple[str, int]] = []
        for r in self.records:
            bad = [f"{name} was not finite" for name in r.get("nonfinite", {})]
            seen += [(text, r["iteration"] + 1) for text in (*r.get("warnings", []), *bad)]
        first = dict(reversed(seen))
        counts = Counter(text for text, _ in seen)
        return [
            f"{text} (iteration {first[text]}{f' and {n - 1} later' if n > 1 else ''})" for text, n in counts.items()
        ]

    @property
    def base_model(self) -> str | None:
        """Hub id or path of the diffusion model; None for the embedded toy."""
        default = DEFAULTS.get(self.settings["model"])
        path = self.settings["pretrained_model_name_or_path"]
        return path or (default.pretrained_model_name_or_path if default else None)

    def loading(self, weights: str) -> str:
        """Python that draws with what was trained; `weights`: the run directory or a hub repository."""
        s = self.settings
        base = f'"{self.base_model}"' if self.base_model else 'toy_files()["model"]'
        pipeline = "StableDiffusionPipeline" if s["model"] == "sd15" else "StableDiffusionXLPipeline"
        load = "from_single_file" if base.endswith('.safetensors"') else "from_pretrained"
        unet = s["full_finetune"]
        lines = ["import torch", f"from diffusers import {pipeline}" + (", UNet2DConditionModel" if unet else "")]
        if not self.base_model:
            lines += ["from spo_fast.toy.pipeline import toy_files"]
        lines += ["", 'settings = {"torch_dtype": torch.float16}']
        if unet:
            source = f'"{weights}", subfolder="unet", torch_dtype=torch.float16'
            lines += [f'settings["unet"] = UNet2DConditionModel.from_pretrained({source})']
        lines += [f'pipe = {pipeline}.{load}({base}, **settings).to("cuda")']
        if (
            load == "from_single_file" and (told := self._file_prediction()) != "epsilon"
        ):  # which diffusers takes it for
            lines += [
                "pipe.scheduler = type(pipe.scheduler).from_config(",
                f'    pipe.scheduler.config, prediction_type="{told}"',
                ")",
            ]
        if not unet:
            lines += [f'pipe.load_lora_weights("{weights}")']
        draw = f"num_inference_steps={s['num_steps']}, guidance_scale={s['guidance_scale']}"
        lines += [f'image = pipe("a prompt", {draw}).images[0]']
        return "\n".join(lines)

    def _file_prediction(self) -> str:
        """What a single file's network predicts."""
        source = DEFAULTS.get(self.settings["model"], DEFAULTS["sdxl"])
        path = Path(str(self.base_model)).expanduser()
        told = scheduler_config(Resolved(source, path, None)) if path.is_file() else {}
        return told.get("prediction_type", "epsilon")


def count_text(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    h, m = divmod(minutes, 60)
    return f"{h} h {m} min" if h else f"{m} min {s} s" if m else f"{s} s"


def started(before: dict[str, Any]) -> dict[str, float]:
    """samples/before.json as fields of the log."""
    means = {name: np.mean([np.nan if v is None else v for v in values]) for name, values in before["values"].items()}
    found = {f"held_out_{name}": float(mean) for name, mean in means.items() if name not in LOOKS}
    found |= {f"look_{name}": 1.0 for name, mean in means.items() if name in LOOKS and mean > 0}
    return {k: v for k, v in {"validation_score": before["score"], **found}.items() if v is not None}


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# ---------------------------------------------------------------------------------------------------- curves


@dataclass(frozen=True)
class Chart:
    title: str
    fields: tuple[str, ...]  # of the records; patterns
    about: str = ""
    level: float | None = None  # a dotted line
    stacked: bool = False


CHARTS = (
    Chart("Validation score", ("validation_score",), "of the validation prompts, always from the same noise"),
    Chart(
        "Looks of the validation pictures",
        ("look_*",),
        "1: before training; above the dotted line: reward hacking?",
        level=1 + RISE,
    ),
    Chart("Loss", ("loss",), "dotted: 0.693, where it stands when policy and reference agree", level=math.log(2)),
    Chart("Candidates' mean score", ("score_mean",), "of the prompts of each iteration: it varies with them"),
    Chart("Share of valid pairs", ("valid_share",), "pairs whose scores differ by more than the threshold"),
    Chart("Log-ratio of policy to reference", ("log_ratio_best", "log_ratio_worst"), "of winners and losers"),
    Chart("Accuracy", ("accuracy",), "share of pairs whose winner gained more probability than its loser"),
    Chart("Held-out accuracy", ("validation_accuracy",), "held-out pairs whose preferred image is ahead", level=0.5),
    Chart("Margin", ("margin",), "beta times the difference of the log-ratios"),
    Chart("Probability ratio", ("ratio",), "of the policy to the one that collected"),
    Chart("KL", ("approx_kl", "kl"), "to the policy that collected; kl (dpok): squared distance from the reference"),
    Chart("Clamped share", ("clamped", "dead"), "transitions outside the clamp; dead: terms without gradient"),
    Chart("Gradient norm", ("grad_norm",), "before clipping"),
    Chart("Saturation", ("saturation*",), "a climb is a sign of reward hacking"),
    Chart("Time of an iteration, seconds", ("*_ms",), "phases stacked", stacked=True),
    Chart("TFLOP/s", ("tflop_per_s",), "model FLOPs, counted from the shapes"),
)
INK = "#808080"  # stands for the page's text colour
COLOURS = ("#3b82c4", "#d9822b", "#3a9d5d", "#c2525a", "#8a6bbf", "#8f7a5c")


def binned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, ...]:
    """(x, mean, least, greatest) of at most MAX_POINTS equal parts; NaN where a part has no finite value."""
    parts = np.array_split(np.arange(len(x)), min(MAX_POINTS, len(x)))
    rows = []
    for part in parts:
        values = y[part][np.isfinite(y[part])]
        rows.append((x[part].mean(), *((values.mean(), values.min(), values.max()) if len(values) else [math.nan] * 3)))
    return tuple(np.array(rows).T)


def draw(chart: Chart, run: RunRecord) -> str | None:
    """The chart as SVG, a group with id curve-<field> a curve; None if there is nothing to draw."""
    import matplotlib
    from cycler import cycler
    from matplotlib.figure import Figure

    known = list(dict.fromkeys(name for r in run.records for name in r))
    names = [n for pattern in chart.fields for n in known if fnmatch.fnmatchcase(n, pattern)]
    curves = {n: binned(*run.curve(n)) for n in names if np.isfinite(run.curve(n)[1]).any()}
    if not curves:
        return None
    style: dict[Any, Any] = {
        **{"svg.fonttype": "none", "svg.hashsalt": chart.title, "path.simplify": False, "font.size": 8.5},
        **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
        **{"axes.spines.top": False, "axes.spines.right": False, "axes.prop_cycle": cycler(color=COLOURS)},
        **{"axes.formatter.useoffset": False, "legend.frameon": False, "font.family": "sans-serif"},
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.6, 2.4))
        axes = figure.add_axes((0.13, 0.12, 0.85, 0.83 if len(curves) == 1 else 0.72))
        if chart.stacked:
            stack(axes, run, list(curves))
        else:
            for name, (x, mean, least, greatest) in curves.items():
                (line,) = axes.plot(
                    x,
                    mean,
                    "o-" if len(x) <= 40 else "-",
                    ms=2.5,
                    lw=1.2,
                    label=name.removeprefix("look_"),
                    gid=f"curve-{name}",
                )
                if len(run.curve(name)[0]) > MAX_POINTS:
                    axes.fill_between(x, least, greatest, color=line.get_color(), alpha=0.25, lw=0)
            keep_readable(axes, [band for _, *bands in curves.values() for band in bands])
        if chart.level is not None:
            axes.axhline(chart.level, color=INK, lw=0.8, ls=":")
        for start in epoch_starts(run):
            axes.axvline(start, color=INK, lw=0.5, alpha=0.35, gid="epoch")
        if len(curves) > 1:
            axes.legend(ncols=3, fontsize=7.5, loc="lower left", bbox_to_anchor=(0, 0.98), borderaxespad=0)
        out = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    svg = out.getvalue().replace(INK, "currentColor")
    return svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{escape(chart.title)}"', 1)


def stack(axes: Any, run: RunRecord, names: list[str]) -> None:
    """Phases on top of each other; one that an iteration lacks took no time."""
    x = np.array([r["iteration"] + 1.0 for r in run.records])
    values = {n: np.array([(r.get(n) or 0.0) / 1000 for r in run.records]) for n in names}
    heights = [binned(x, y)[1] for y in values.values()]
    if len(x) == 1:  # an area needs two
        x, heights = np.array([0.5, 1.5]) + x - 1, [h.repeat(2) for h in heights]
    areas = axes.stackplot(binned(x, x)[0], *heights, labels=[n.removesuffix("_ms") for n in names], alpha=0.8, lw=0)
    for name, area in zip(names, areas, strict=True):
        area.set_gid(f"curve-{name}")


def keep_readable(axes: Any, values: list[np.ndarray]) -> None:
    """A few spikes may leave the picture rather than flatten the rest of the curve."""
    drawn = np.concatenate(values)
    drawn = drawn[np.isfinite(drawn)]
    low, high = np.percentile(drawn, (2, 98))
    if high > low and np.ptp(drawn) > 5 * (high - low):
        room, least, greatest = (high - low) / 2, drawn.min(), drawn.max()
        axes.set_ylim(max(low - room, least), min(high + room, greatest))
        text = f"from {least:.3g} to {greatest:.3g}: spikes are cut off"
        axes.text(1, 1, text, transform=axes.transAxes, ha="right", va="bottom", fontsize=7.5)


def epoch_starts(run: RunRecord) -> list[float]:
    """Where a new epoch begins, thinned out."""
    starts = [
        b["iteration"] + 0.5
        for a, b in zip(run.records, run.records[1:], strict=False)
        if a.get("epoch") != b.get("epoch")
    ]
    return starts[:: math.ceil(len(starts) / MAX_EPOCH_MARKS) or 1]


# ---------------------------------------------------------------------------------------------------- samples


def grids(run: RunRecord) -> tuple[list[tuple[str, Path]], int]:
    """Labelled sample grids to show (before, some of those during, after), and how many there are."""
    samples = run.run_dir / "samples"
    scores = run.validated

    def label(text: str, done: int) -> str:
        score = scores.get(done)
        return text if score is None else f"{text}: {score:.4g}"

    steps = {int(p.stem.removeprefix("step-")): p for p in samples.glob("step-*.png") if p.stem[5:].isdigit()}
    after = [(label("after", run.iterations), samples / "after.png")] if (samples / "after.png").is_file() else []
    if after:
        steps.pop(run.iterations, None)  # the same grid
    before = [(label("before", 0), samples / "before.png")] if (samples / "before.png").is_file() else []
    order = sorted(steps)
    # evenly spread; while the run goes on, its latest is the last of them
    parts = np.array_split(order, min(MAX_GRIDS_DURING, len(order))) if order else []
    during = [(label(f"iteration {n}", n), steps[n]) for n in (int(part[-1]) for part in parts)]
    return [*before, *during, *after], len(before) + len(steps) + len(after)


def sheet_prompts(path: Path) -> list[str]:
    """The prompts of a grid's rows, which its PNG carries."""
    from PIL import Image

    with Image.open(path) as image:
        return json.loads(getattr(image, "text", {}).get("prompts", "[]"))


def cut_rows(path: Path, rows: int) -> list[Any]:
    """A grid's first MAX_PROMPTS of `rows` rows as images, at most STRIP_WIDTHS[0] pixels wide."""
    from PIL import Image

    with Image.open(path) as sheet:
        whole, height = sheet.convert("RGB"), sheet.height / rows
    return [
        narrowed(whole.crop((0, round(i * height), whole.width, round((i + 1) * height))), STRIP_WIDTHS[0])
        for i in range(min(rows, MAX_PROMPTS))
    ]


def narrowed(image: Any, width: int) -> Any:
    size = (width, max(1, round(image.height * width / image.width)))
    return image if image.width <= width else image.resize(size, reducing_gap=3.0)


def encoded(image: Any) -> tuple[str, bytes]:
    """(media type, bytes) as JPEG, or as PNG where that is smaller, as for the toy's enlarged pixels."""
    files = {}
    # PNGs of large photographs are slow to make and never the smaller ones
    for kind in ("jpeg", "png") if image.width * image.height <= 250_000 else ("jpeg",):
        out = io.BytesIO()
        image.save(out, kind, quality=88)
        files[kind] = out.getvalue()
    kind = min(files, key=lambda k: len(files[k]))
    return f"image/{kind}", files[kind]


def samples_html(run: RunRecord) -> str:
    """The grids, a block a prompt, and in it under each other what the same noise became."""
    shown, count = grids(run)
    if not shown:
        return ""
    prompts = sheet_prompts(shown[-1][1])
    shown = [(label, path) for label, path in shown if sheet_prompts(path) == prompts]
    sheets = [cut_rows(path, len(prompts) or 1) for _, path in shown]
    for width in STRIP_WIDTHS:
        strips = [[encoded(narrowed(image, width)) for image in sheet] for sheet in sheets]
        if sum(len(data) for sheet in strips for _, data in sheet) <= MAX_IMAGE_BYTES:
            break
    blocks = []
    for prompt, *block in zip(prompts or ["all prompts"], *strips, strict=False):
        figures = [
            f"<figure><figcaption>{escape(label)}</figcaption>"
            f'<img alt="{escape(label)}" src="data:{kind};base64,{base64.b64encode(data).decode()}"></figure>'
            for (label, _), (kind, data) in zip(shown, block, strict=True)
        ]
        blocks.append(f'<div class="prompt"><h3>{escape(prompt)}</h3>{"".join(figures)}</div>')
    left = f"{len(shown)} of {count} grids"
    if len(prompts) > len(blocks):
        left += f", {len(blocks)} of {len(prompts)} prompts"
    return (
        "<h2>Samples</h2><p>Images in a column began as the same noise. The number is the mean score of the grid. "
        f'Shown: {left}; full size in samples/.</p><div class="prompts">{"".join(blocks)}</div>'
    )


# ---------------------------------------------------------------------------------------------------- the page

CSS = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1280px; margin: 0 auto; padding: 1rem; }
body { overflow-wrap: break-word; }
h1 { font-size: 1.4rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .3rem; }
h3 { font-size: 1rem; font-weight: 600; margin: 0 0 .4rem; }
.verdict { font-size: 1.1rem; margin: .3rem 0; } .about, figcaption span { opacity: .7; }
.warnings h2 { margin: 0; } .warnings { border-left: 4px solid #d9822b; padding: .1rem 1rem; }
.charts { display: grid; gap: 1.2rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 360px), 1fr)); }
.prompts { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 560px), 1fr)); }
figure { margin: 0; } .prompt figcaption { font-size: .85rem; opacity: .8; } img, svg { max-width: 100%; height: auto; }
svg { width: 100%; } .charts figcaption { min-height: 3em; }
.table { overflow-x: auto; } td { max-width: 40rem; } td:first-child { white-space: nowrap; }
table { border-collapse: collapse; } td, th { text-align: left; padding: .15rem 1rem .15rem 0; vertical-align: top; }
td, th { border-bottom: 1px solid #8884; } pre { overflow-x: auto; background: #8881; padding: .7rem; }
pre, code, td { font-size: .9rem; } pre { overflow-wrap: normal; }
"""


def page(run: RunRecord) -> str:
    """The whole report as HTML."""
    s = run.settings
    title = f"{s['method'].upper()} on {s['model']}: {run.run_dir.resolve().name}"
    held_out = [Chart(f"Held-out {m}", (f"held_out_{m}",), "not trained on, same pictures") for m in run.held_out]
    drawn = [(chart, draw(chart, run)) for chart in (*CHARTS[:1], *held_out, *CHARTS[1:])]
    charts = "".join(
        f"<figure><figcaption><b>{escape(c.title)}</b> <span>{escape(c.about)}</span></figcaption>{svg}</figure>"
        for c, svg in drawn
        if svg
    )
    many = f" Lines are means of {MAX_POINTS} equal parts, bands reach from least to greatest." * (
        len(run.records) > MAX_POINTS
    )
    about = f"Against iterations; vertical lines begin an epoch.{many}" if charts else "Nothing was logged yet."
    warnings = "".join(f"<li>{escape(text)}</li>" for text in run.warnings())
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code></td><td>{escape(value(old))}</td><td>{escape(value(new))}</td></tr>"
        for name, (old, new) in run.changed().items()
    )
    head = f"<tr><th>setting</th><th>preset {escape(s['model'])}</th><th>this run</th></tr>"
    table = f'<div class="table"><table>{head}{rows}</table></div>' if rows else "<p>All as in the preset.</p>"
    everything = yaml.safe_dump(s, sort_keys=False, allow_unicode=True)
    follows = "follows: a rise shows that training works, the images show whether it is for the better"
    if s["method"] in DATA:
        follows = "did not ask: it learns from labelled pairs"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{CSS}</style></head><body>
<h1>{escape(title)}</h1>
<p class="verdict">{escape(run.verdict())}.</p>
<p class="about">The score is that of {escape(", ".join(s["scorer"]))}, which the training {follows}.</p>
{f'<div class="warnings"><h2>Warnings</h2><ul>{warnings}</ul></div>' if warnings else ""}
<h2>Curves</h2><p>{about}</p><div class="charts">{charts}</div>
{samples_html(run)}
<h2>Settings</h2>
{table}
<details><summary>All settings</summary><pre>{escape(everything)}</pre></details>
<h2>Use what was trained</h2>
{use_html(run)}
</body></html>
"""


def value(setting: Any) -> str:
    """A setting as people read it."""
    text = ", ".join(map(str, setting)) if isinstance(setting, list) else setting
    return "none" if text in (None, "") else str(text)


def use_html(run: RunRecord) -> str:
    """Where the files are and how other software loads them."""
    if run.settings["full_finetune"]:
        files = "The trained UNet is in unet/, in diffusers' layout."
    else:
        files = (
            "ComfyUI, A1111: copy lora_kohya.safetensors to models/loras (A1111: models/Lora) and load it there as a "
            "LoRA of strength 1, for example by ComfyUI's LoraLoaderModelOnly node. diffusers:"
        )
    return (
        f"<p>{files}</p><pre>{escape(run.loading(str(run.run_dir)))}</pre>"
        f"<p>Everything lies in <code>{escape(str(run.run_dir))}</code>: metrics.jsonl (all numbers), "
        "samples/, checkpoint-*/ (to resume from), config.yaml; the weights are there when the run has ended.</p>"
    )


def write_report(run_dir: str | Path) -> Path:
    """Write report.html of a run from what is in its directory."""
    path = Path(run_dir) / "report.html"
    write_atomically(path, page(RunRecord.read(run_dir)))
    return path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m spo_fast.report", description="Write report.html of a run.")
    parser.add_argument("run_dir", help="the --output_dir of a run, finished or not")
    try:
        print(write_report(parser.parse_args(arguments).run_dir))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
