"""Scores of pictures, one file a contender and metric; those that are there already are kept."""

from __future__ import annotations

import hashlib
import inspect
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from spo_fast.config.evaluation import EvaluationConfig
from spo_fast.config.scorers import SCORERS, TRUE_SCORES, judging_parts
from spo_fast.data.files import read_json, weight_files, without_nan, write_atomically
from spo_fast.data.prompt_sets import Wanted, geneval_records, prompt_files
from spo_fast.evaluation.contenders import Gallery, why_no_true_scores
from spo_fast.evaluation.metrics import Metric, make_metric
from spo_fast.evaluation.pictures import read_picture
from spo_fast.models.diffusion import DTYPES
from spo_fast.models.files.load import load_tokenizers
from spo_fast.models.files.sources import Resolved
from spo_fast.models.tensor_cache import fingerprint_files
from spo_fast.scorers.function import FunctionScorer


def wanted(cfg: EvaluationConfig) -> dict[str, Wanted]:
    """What GenEval looks for in the prompts' pictures."""
    return geneval_records(prompt_files(cfg.pictures.prompts or "geneval")[1][0])


def check_scores(cfg: EvaluationConfig, prompts: list[str], device: torch.device) -> None:
    """Raises ValueError, before anything is drawn, for a metric that cannot judge these pictures."""
    asked = [name for name in cfg.metric.metric_names if name in TRUE_SCORES]
    if asked and (why := why_no_true_scores(cfg, prompts)):
        raise ValueError(f"--metrics {' '.join(asked)}: true scores {why}. Leave them out.")
    for name in cfg.metric.metric_names:
        if name in SCORERS and (function := SCORERS[name].function) is not None:
            FunctionScorer(name, function, device).check(prompts)


def metric_of(name: str, cfg: EvaluationConfig, resolved: Resolved, device: torch.device) -> Metric:
    """A metric with its weights."""
    tokenizer = load_tokenizers(resolved)[0]

    def tokenize(texts: list[str]) -> Tensor:
        ids = tokenizer(list(texts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True)
        return torch.tensor(ids.input_ids)

    asked = wanted(cfg) if judging_parts([name]) else None
    return make_metric(name, resolved.scorer_paths, tokenize, device, DTYPES[cfg.metric.scorer_dtype], asked)


def score_all(
    cfg: EvaluationConfig, resolved: Resolved, galleries: list[Gallery], prompts: list[str], device: torch.device
) -> dict[str, dict[str, np.ndarray]]:
    """Contender -> metric or image statistic -> (P,) means over a prompt's pictures. Kept per contender and metric."""
    per, size = cfg.pictures.images_per_prompt, cfg.pictures.images_at_once
    found: dict[str, dict[str, np.ndarray]] = {g.contender.name: {} for g in galleries}
    asked = ""
    if judging_parts(cfg.metric.metric_names):  # what they look for belongs to their scores
        asked = f" {hashlib.sha256(json.dumps(wanted(cfg)).encode()).hexdigest()}"
    for name in ("looks", *cfg.metric.metric_names):
        paths = [resolved.scorer_paths[n] for n in cfg.metric.paths_of(() if name == "looks" else [name])]
        files = [f for p in paths for f in (weight_files(p) if p.is_file() else p.iterdir()) if f.is_file()]
        weights = fingerprint_files([*files, *own_code(name)])
        metric = None
        for gallery in galleries:
            file = gallery.folder / f"scores-{name.replace(':', '.')}.json"
            key = f"{gallery.digest()} {weights} {cfg.metric.scorer_dtype}{asked if judging_parts([name]) else ''}"
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


def own_code(name: str) -> list[Path]:
    """The file of a scorer of the user's own, in which its scores may change."""
    function = SCORERS[name].function if name in SCORERS else None
    file = None if function is None else inspect.getsourcefile(inspect.unwrap(function))
    return [Path(file)] if file else []


def prompt_weights(cfg: EvaluationConfig, prompts: list[str]) -> dict[str, np.ndarray]:
    """Metric -> (P,) what a prompt counts in its mean, where not all count alike: GenEval means its tasks' means."""
    if not (names := judging_parts(cfg.metric.metric_names)):
        return {}
    from spo_fast.scorers.geneval import task_weights

    asked = wanted(cfg)
    return dict.fromkeys(names, np.array(task_weights([asked[prompt]["tag"] for prompt in prompts])))
