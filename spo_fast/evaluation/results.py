"""An evaluation from files to numbers: draw, score, and write results.json and results.md."""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo_fast.config.evaluation import EvaluationConfig
from spo_fast.data.prompt_sets import prompts_of
from spo_fast.evaluation.contenders import Gallery, check_scores, find_files, fingerprint
from spo_fast.evaluation.draw import decided, draw_all
from spo_fast.evaluation.score import prompt_weights, score_all

if TYPE_CHECKING:
    import numpy as np


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
        """The metrics' names."""
        return self.cfg.metric.metric_names


def summarised(values: Mapping[str, Mapping[str, np.ndarray]], names: list[str], seed: int) -> dict[str, Any]:
    """Contender -> name -> mean with its interval; beside the base also the paired gain and the share of wins."""
    from spo_fast.evaluation.statistics import bootstrap, win_rate

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
    from spo_fast.evaluation.published import PUBLISHED
    from spo_fast.evaluation.statistics import Interval
    from spo_fast.evaluation.tables import markdown

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


def evaluate(cfg: EvaluationConfig) -> Evaluation:
    """Draw, score, and write results.json and results.md. Raises before anything is drawn if something is missing."""
    resolved, contenders = find_files(cfg)
    prompts, set_name = prompts_of(cfg)
    import torch

    from spo_fast.data import files
    from spo_fast.data.files import without_nan
    from spo_fast.evaluation.looks import LOOKS, hacking_signs
    from spo_fast.models.device import found_device, listed, pick_device
    from spo_fast.models.files.contenders import check_unet
    from spo_fast.models.files.layout import text_files, unet_files, vae_files
    from spo_fast.models.files.load import load_tokenizers
    from spo_fast.models.prompt_cache import count_truncated
    from spo_fast.models.tensor_cache import fingerprint_files

    device = pick_device(cfg.pictures.device)
    check_scores(cfg, prompts, device)
    cfg, choices = decided(cfg, device)
    if choices:
        print(f"chosen for this device ({found_device(device).name}):\n{textwrap.indent(listed(choices), '  ')}")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = cfg.model.allow_tf32
    out, c = Path(cfg.pictures.output_dir), cfg.pictures
    differ = {c.name: check_unet(c.path, resolved) for c in contenders if c.kind == "unet" and c.path is not None}
    for name, found in differ.items():
        if any(found):
            print(f"{name}: {found}")
    held = files.lock(out)
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
        "versions": files.versions(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "prompts": {"from": set_name, "count": len(prompts), "truncated": cut},
        "contenders": {g.contender.name: {"source": g.contender.source, "kind": g.contender.kind,
                                          "fingerprint": prints[g.contender.name]} for g in galleries},
        "differences": {name: found._asdict() for name, found in differ.items()},
        "scores": scores,
        "looks": seen,
        "hacking": {n: hacking_signs(values["base"], v, c.seed) for n, v in values.items() if n != "base"},
    }  # fmt: skip
    files.write_atomically(out / "results.json", json.dumps(without_nan(result), indent=1) + "\n")
    files.write_atomically(out / "results.md", page(result, cfg, len(prompts)))
    held.close()
    return Evaluation(cfg, prompts, galleries, raw, values, result)


def page(result: Mapping[str, Any], cfg: EvaluationConfig, num_prompts: int) -> str:
    """results.md: the table, how it was made, and signs of reward hacking."""
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
