"""report.html: what a run did, in one file that loads nothing else."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path

import numpy as np
import yaml

from spo_fast.config.methods import find_method
from spo_fast.data.files import write_atomically
from spo_fast.evaluation.pages.charts import MAX_POINTS, Chart, charts_of, draw
from spo_fast.evaluation.pages.run_record import RunRecord, value
from spo_fast.evaluation.pictures import MAX_IMAGE_BYTES, STRIP_WIDTHS, cut_rows, encoded, narrowed, sheet_prompts

MAX_GRIDS_DURING = 4

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
    method = find_method(s["method"])
    title = f"{method.name.upper()} on {s['model']}: {run.run_dir.resolve().name}"
    held_out = [Chart(f"Held-out {m}", (f"held_out_{m}",), "not trained on, same pictures") for m in run.held_out]
    known = charts_of(method, s)
    drawn = [(chart, draw(chart, run)) for chart in (*known[:1], *held_out, *known[1:])]
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
    if method.on_pairs:
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
