"""Files of flow models (SD3.5, FLUX.1): found, checked, loaded and saved as diffusers has them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_tiny_flux, make_tiny_sd3

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
