"""What an evaluation found: results.json and results.md."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spo_fast.config.evaluation import EvaluationConfig
from spo_fast.config.sections import FLOWS
from spo_fast.config.tables import markdown
from spo_fast.data.files import without_nan, write_atomically
from spo_fast.evaluation.contenders import Gallery
from spo_fast.evaluation.image_statistics import IMAGE_STATISTICS, hacking_signs
from spo_fast.evaluation.published import published_cells
from spo_fast.evaluation.statistics import Interval, bootstrap, win_rate

Values = dict[str, dict[str, np.ndarray]]
"""Contender -> metric or image statistic -> (P,) a value a prompt."""


@dataclass(frozen=True)
class Evaluation:
    """What was drawn and how it was judged."""

    cfg: EvaluationConfig
    prompts: list[str]
    galleries: list[Gallery]
    raw: Values
    values: Values  # the same, times what a prompt counts: their mean is the score
    result: dict[str, Any]  # results.json

    @property
    def metrics(self) -> list[str]:
        """The metrics' names."""
        return self.cfg.metric.metric_names

    def write(self) -> None:
        """results.json and results.md in the output directory."""
        out = Path(self.cfg.pictures.output_dir)
        write_atomically(out / "results.json", json.dumps(without_nan(self.result), indent=1) + "\n")
        write_atomically(out / "results.md", page(self.result, self.cfg, len(self.prompts)))


def summarised(values: Values, names: list[str], seed: int) -> dict[str, Any]:
    """Contender -> name -> mean with its interval; beside the base also the paired gain and the share of wins."""
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

    def shown(row: Mapping[str, Any]) -> str:
        return str(Interval(row["mean"], row["low"], row["high"]))

    rows = [["", *metrics]]
    for name, scores in result["scores"].items():
        rows.append([name, *(shown(scores[m]) for m in metrics)])
        if name != "base":
            rows.append([f"{name} - base, paired", *(shown(scores[m]["gain"]) for m in metrics)])
            rows.append([f"{name} wins against base", *(shown(scores[m]["win_rate"]) for m in metrics)])
    rows += [[f"{name} (published)", *cells] for name, cells in published_cells(model, metrics)]
    return markdown(rows)


def summary(values: Values, cfg: EvaluationConfig) -> dict[str, Any]:
    """What results.json says of the scores."""
    seed = cfg.pictures.seed
    return {
        "scores": summarised(values, cfg.metric.metric_names, seed),
        "looks": summarised(values, list(IMAGE_STATISTICS), seed),
        "hacking": {n: hacking_signs(values["base"], v, seed) for n, v in values.items() if n != "base"},
    }


def page(result: Mapping[str, Any], cfg: EvaluationConfig, num_prompts: int) -> str:
    """results.md: the table, how it was made, and signs of reward hacking."""
    c, told = cfg.pictures, cfg.model.embedded_guidance
    steps = "Euler" if cfg.model.model in FLOWS else "DDIM"  # the same, of a flow
    guidance = f"guidance {c.guidance_scale:g}" + ("" if told is None else f" (embedded {told:g})")
    signs = [f"- {name}: {text}" for name, found in result["hacking"].items() for text in found.values()]
    lines = [
        table(result, cfg.model.model, cfg.metric.metric_names),
        "",
        f"{num_prompts} prompts ({result['prompts']['from']}), {c.images_per_prompt} pictures each, {c.num_steps} "
        f"{steps} steps, {guidance}, seed {c.seed}; means with 95 % bootstrap intervals over prompts. Rows "
        "marked published are their authors' numbers (Pick-a-Pic's 500 validation prompts), not measured here.",
        *(["", "Signs of reward hacking:", "", *signs] if signs else []),
    ]
    return "\n".join(lines) + "\n"
