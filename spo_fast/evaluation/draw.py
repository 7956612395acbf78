"""Pictures of all contenders from the same noise; those that are there already are kept."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import torch

from spo_fast.config.evaluation import EvaluationConfig
from spo_fast.config.sections import TOYS
from spo_fast.config.training import Config, EngineConfig
from spo_fast.evaluation.contenders import Gallery
from spo_fast.evaluation.pictures import write_picture
from spo_fast.evaluation.sampling import NOISES, Drawn, draw_latents
from spo_fast.models.accelerate import prepare_drawing
from spo_fast.models.compile import compile_network, keep_cache
from spo_fast.models.device import DRAWING_S, Choice, compile_pays, found_device, how_computed, network_width
from spo_fast.models.diffusion import DiffusionModel
from spo_fast.models.files.load import load_network, load_unet_from
from spo_fast.models.files.lora import apply_lora, read_file
from spo_fast.models.files.sources import Resolved
from spo_fast.models.flow import load_model
from spo_fast.models.fuse import fuse

# --------------------------------------------------------------------------------------------------------- pictures


def draw_all(
    cfg: EvaluationConfig, resolved: Resolved, galleries: list[Gallery], prompts: list[str], device: torch.device
) -> None:
    """Make the pictures that are not there yet. The model is loaded only if one is missing."""
    todo = [g for g in galleries if not all(file.is_file() for file in g.files)]
    if not todo:
        return
    out, c, engine = Path(cfg.pictures.output_dir), cfg.pictures, cfg.engine
    model = load_model(cfg.model, resolved, device, out / "prompt_cache")
    for contender in (gallery.contender for gallery in todo if gallery.contender.kind == "lora"):
        assert contender.path is not None
        read_file(contender.path, model.network)  # one that does not fit is told before anything is drawn
    model.prompt_cache.ensure([*prompts, ""])
    if engine.fuse:
        fuse(model.vae)
    if engine.compile != "off":
        print(f"compiled networks are kept in {keep_cache(out)}")
        if hasattr(model.vae, "decoder"):
            compile_network(model.vae.decoder, str(engine.compile))
    # whole UNets last: they take the base model's place
    for gallery in sorted(todo, key=lambda g: g.contender.kind == "unet"):
        contender = gallery.contender
        if contender.kind == "unet":
            assert contender.path is not None
            model.network = None  # type: ignore[assignment]  # its memory goes first
            model.network = load_unet_from(contender.path, model.dtype).to(device)  # type: ignore[arg-type]
        elif model.network is None:
            model.network = load_network(resolved, model.dtype).to(device)
        if contender.kind == "lora":
            assert contender.path is not None
            print(f"{contender.name}: {apply_lora(contender.path, model.network)}", flush=True)
        if engine.fuse:
            rows = c.images_at_once * (2 if c.guidance_scale > 1 else 1)
            kernel = prepare_drawing(model.network, engine, rows, model.latent_shape, model.text_tokens)
            print(f"{contender.name}: {kernel.words}: {kernel.reason}")
        draw(cfg, model, gallery, prompts)
        if engine.fuse or contender.kind == "lora":
            # fused with what it wore, or changed for good: the next one starts from the file
            model.network = None  # type: ignore[assignment]


def draw(cfg: EvaluationConfig, model: DiffusionModel, gallery: Gallery, prompts: list[str]) -> None:
    """Plain DDIM (eta 0). A batch that lacks a picture is drawn whole: its numbers depend on its company."""
    c, files = cfg.pictures, gallery.files
    table, policy = model.table(c.num_steps, 0.0), Drawn(model.network, bool(cfg.engine.fuse))
    noise = c.seed, NOISES[c.noise_of]
    for start in range(0, len(files), c.images_at_once):
        numbers = range(start, min(start + c.images_at_once, len(files)))
        if all(files[n].is_file() for n in numbers):
            continue
        drawn = list(numbers)
        if cfg.engine.compile != "off":  # a graph is for one size: a short last batch is filled up
            drawn += [start] * (c.images_at_once - len(drawn))
        part = [prompts[n // c.images_per_prompt] for n in drawn]
        latents = draw_latents(policy, model, table, part, drawn, c.guidance_scale, noise)
        for at in range(0, len(drawn), cfg.model.images_per_decode):
            chunk = slice(at, at + cfg.model.images_per_decode)
            for n, pixels in zip(drawn[chunk], model.decode(latents[chunk]).float().cpu(), strict=True):
                if not files[n].is_file():
                    write_picture(files[n], pixels)
        print(f"{gallery.contender.name}: {numbers.stop} of {len(files)} pictures", flush=True)


# ---------------------------------------------------------------------------------------------------------- results


def decided(
    cfg: EvaluationConfig, resolved: Resolved, device: torch.device, prompts: int
) -> tuple[EvaluationConfig, list[Choice]]:
    """cfg with what it leaves to the device filled in as a training fills it in, and why."""
    asked = {f.name: getattr(cfg.engine, f.name) for f in fields(cfg.engine)}
    training = Config(model=cfg.model, engine=EngineConfig(**asked))
    # of one contender, as on an H200: another contender, or another card, goes on with the same pictures
    pays = compile_pays(prompts * cfg.pictures.images_per_prompt * picture_flops(cfg), None, DRAWING_S)
    width = network_width(resolved, cfg.model.model)
    chosen, choices = how_computed(training, found_device(device), lambda _: pays, width)
    names = ("mixed_precision", "compile", "fuse")
    filled = cfg.with_fields(**{name: chosen.flat()[name] for name in names})
    return filled, [choice for choice in choices if choice.flag in names]


PICTURE_TFLOP = {
    "sd15": (512, 0.803, 2.51),
    "sdxl": (1024, 6.76, 10.5),
    "sd35": (512, 2.22, 2.51),
    "flux": (512, 21.5, 2.51),
    **dict.fromkeys(TOYS, (16, 2e-4, 0)),
}
"""Pixels a side, TFLOP of a network's row and of decoding, counted (training/plan); in proportion for other sizes."""


def picture_flops(cfg: EvaluationConfig) -> float:
    """Of one picture: its steps and its decoding."""
    side, row, decoded = PICTURE_TFLOP[cfg.model.model]
    rows = cfg.pictures.num_steps * (2 if cfg.pictures.guidance_scale > 1 else 1)
    pixels = (cfg.model.height or side) * (cfg.model.width or side)
    return 1e12 * (rows * row + decoded) * pixels / side**2
