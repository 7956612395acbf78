"""An evaluation from files to numbers: draw, score, and write results.json and results.md."""

from __future__ import annotations

import hashlib
import json
import textwrap
from pathlib import Path
from typing import Any

import torch

from spo_fast.config.evaluation import EvaluationConfig
from spo_fast.data import files
from spo_fast.data.prompt_sets import prompts_of
from spo_fast.evaluation.contenders import Contender, Gallery, fingerprint
from spo_fast.evaluation.draw import decided, draw_all
from spo_fast.evaluation.results import Evaluation, summary
from spo_fast.evaluation.score import check_scores, prompt_weights, score_all
from spo_fast.models.device import found_device, listed, pick_device
from spo_fast.models.files.contenders import check_unet
from spo_fast.models.files.layout import text_files, unet_files, vae_files
from spo_fast.models.files.load import load_tokenizers
from spo_fast.models.files.sources import Resolved
from spo_fast.models.prompt_cache import warn_too_long
from spo_fast.models.tensor_cache import fingerprint_files

DRAWN_BY = ("images_per_prompt", "num_steps", "guidance_scale", "seed", "noise_of")


def evaluate(
    cfg: EvaluationConfig,
    resolved: Resolved,  # files, as contenders.find_files finds them
    contenders: list[Contender],
) -> Evaluation:
    """Draw, score, and write results.json and results.md."""
    prompts, set_name = prompts_of(cfg)
    device = pick_device(cfg.pictures.device)
    check_scores(cfg, prompts, device)
    cfg, choices = decided(cfg, resolved, device, len(prompts))
    if choices:
        print(f"chosen for this device ({found_device(device).name}):\n{textwrap.indent(listed(choices), '  ')}")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = cfg.model.allow_tf32
    out = Path(cfg.pictures.output_dir)
    differ = {c.name: check_unet(c.path, resolved) for c in contenders if c.kind == "unet" and c.path is not None}
    for name, found in differ.items():
        if any(found):
            print(f"{name}: {found}")
    held = files.lock(out)
    tokenizer = load_tokenizers(resolved)[0]
    cut = warn_too_long(tokenizer, prompts)
    settings = drawn_by(cfg, resolved, prompts)
    galleries = [Gallery(one, out / one.name, len(prompts), cfg.pictures.images_per_prompt) for one in contenders]
    prints = {one.name: fingerprint(one) for one in contenders}
    for gallery in galleries:
        gallery.check({**settings, "contender": prints[gallery.contender.name]})
    draw_all(cfg, resolved, galleries, prompts, device)
    raw, weights = score_all(cfg, resolved, galleries, prompts, device), prompt_weights(cfg, prompts)
    values = {name: {m: v * weights.get(m, 1.0) for m, v in found.items()} for name, found in raw.items()}
    result = {
        "settings": {**settings, **cfg.flat()},
        "versions": files.versions(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "prompts": {"from": set_name, "count": len(prompts), "truncated": cut},
        "contenders": {c.name: {"source": c.source, "kind": c.kind, "fingerprint": prints[c.name]} for c in contenders},
        "differences": {name: found._asdict() for name, found in differ.items()},
        **summary(values, cfg),
    }
    evaluation = Evaluation(cfg, prompts, galleries, raw, values, result)
    evaluation.write()
    held.close()
    return evaluation


def drawn_by(cfg: EvaluationConfig, resolved: Resolved, prompts: list[str]) -> dict[str, Any]:
    """All that pictures depend on besides the contender."""
    return {
        "model": fingerprint_files([*unet_files(resolved), *vae_files(resolved), *text_files(resolved)]),
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        "sampler": "DDIM, eta 0",
        **{name: getattr(cfg.model, name) for name in ("mixed_precision", "height", "width")},
        **cfg.model.told,
        **{name: getattr(cfg.engine, name) for name in ("compile", "fuse", "attention")},
        **{name: getattr(cfg.pictures, name) for name in DRAWN_BY},
    }
