"""Files of flow models (SD3.5, FLUX.1): found, checked, loaded and saved as diffusers has them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_tiny_flux, make_tiny_sd3

from spo_fast.models.files import layout, load
from spo_fast.models.files.find import resolve_all
from spo_fast.models.files.sources import ModelSource, Resolved

MAKERS: dict[str, Callable[..., Path]] = {"sd35": make_tiny_sd3, "flux": make_tiny_flux}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, Path]:
    """A tiny model of each kind, FLUX.1-schnell's kind, and SD3 without T5."""
    folder = tmp_path_factory.mktemp("flow")
    made = {kind: make(folder / kind) for kind, make in MAKERS.items()}
    made["schnell"] = make_tiny_flux(folder / "schnell", guidance=False)
    made["sd3 without T5"] = make_tiny_sd3(folder / "sd3_no_t5", t5=False)
    return made


def pipeline(path: Path, **options: Any):
    import diffusers

    cls = diffusers.FluxPipeline if (path / "text_encoder_2" / "config.json").read_text().count("T5") else None
    cls = cls or diffusers.StableDiffusion3Pipeline
    if not (path / "text_encoder_3").is_dir() and cls is diffusers.StableDiffusion3Pipeline:
        options |= dict(text_encoder_3=None, tokenizer_3=None)  # diffusers asks for them in words
    found = cls.from_pretrained(path, local_files_only=True, **options)
    found.set_progress_bar_config(disable=True)
    return found


def picture(pipe, prompt: str = "a red cat") -> torch.Tensor:
    draws = torch.Generator().manual_seed(0)
    options = dict(height=64, width=64, num_inference_steps=2, max_sequence_length=32, output_type="pt")
    return pipe(prompt, generator=draws, **options).images


@pytest.mark.parametrize("name", ["sd35", "flux", "schnell", "sd3 without T5"])
def test_tiny_directories_are_diffusers_own(tiny, name):
    pipe = pipeline(tiny[name])
    red, blue = picture(pipe), picture(pipe, "a blue dog")
    assert red.shape == (1, 3, 64, 64) and red.std() > 0.05
    assert not torch.allclose(red, blue, atol=1e-6)  # the prompt matters


def resolve(path: Path | str, kind: str, **options: Any) -> Resolved:
    return resolve_all(ModelSource(kind=kind, pretrained_model_name_or_path=str(path), **options), download=False)


KINDS = {"sd35": "sd35", "flux": "flux", "schnell": "flux", "sd3 without T5": "sd35"}


@pytest.mark.parametrize("name", KINDS)
def test_parts_are_those_of_the_pipeline(tiny, name):
    resolved, pipe = resolve(tiny[name], KINDS[name]), pipeline(tiny[name])
    load.check_weights(resolved)
    encoders = [p for p in (pipe.text_encoder, pipe.text_encoder_2, getattr(pipe, "text_encoder_3", None)) if p]
    tokenizers = [t for t in (pipe.tokenizer, pipe.tokenizer_2, getattr(pipe, "tokenizer_3", None)) if t]
    ours = [
        (load.load_transformer(resolved, torch.float32), pipe.transformer),
        (load.load_vae(resolved, torch.float32), pipe.vae),
        *zip(load.load_text_encoders(resolved, torch.float32), encoders, strict=True),
    ]
    for mine, theirs in ours:
        assert type(mine) is type(theirs) and not mine.training
        assert not any(p.requires_grad for p in mine.parameters())
        mine, theirs = mine.state_dict(), theirs.state_dict()
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    for mine, theirs in zip(load.load_tokenizers(resolved), tokenizers, strict=True):
        text = "A red cat, left of 2 blue dogs!"
        assert mine(text).input_ids == theirs(text).input_ids and mine.pad_token_id == theirs.pad_token_id
    config = dict(pipe.scheduler.config)
    assert {**config, **layout.scheduler_config(resolved)} == config
    folders = {file.parent.name for file in layout.text_files(resolved)}
    assert folders == {part for pair in resolved.text_parts for part in pair}
    assert [f.name for f in layout.unet_files(resolved)] == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert {f.name for f in layout.vae_files(resolved)} == {"config.json", "diffusion_pytorch_model.safetensors"}


def test_t5_in_float16_keeps_the_layer_that_overflows_in_float32(tiny):
    from transformers import T5EncoderModel

    t5 = load.load_text_encoder(resolve(tiny["flux"], "flux"), "text_encoder_2", torch.float16)
    theirs = T5EncoderModel.from_pretrained(tiny["flux"] / "text_encoder_2", dtype=torch.float16).requires_grad_(False)
    assert {n: p.dtype for n, p in t5.named_parameters()} == {n: p.dtype for n, p in theirs.named_parameters()}
    assert t5.encoder.embed_tokens.weight is t5.shared.weight
    ids = torch.tensor([[3, 4, 5, 1]])
    assert torch.equal(t5(ids)[0], theirs(ids)[0])
