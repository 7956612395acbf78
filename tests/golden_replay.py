"""Rebuilds the tiny networks of the golden fixtures and replays recorded draws. Used by test_golden.py and
test_rollout.py."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file

from spo_fast.config.training import AdapterConfig
from spo_fast.method.experience import Cond
from spo_fast.method.schedule import StepTable, ddim_table
from spo_fast.models.policy import Policy
from spo_fast.scorers.clip_files import load_clip
from spo_fast.scorers.spm import ClipScorer

GOLDEN = Path(__file__).parent / "golden"


def load(name: str) -> tuple[dict[str, torch.Tensor], dict]:
    return load_file(GOLDEN / f"{name}.safetensors"), json.loads((GOLDEN / f"{name}.json").read_text())


def build(cls, config: dict, tensors: dict, prefix: str, dtype: torch.dtype):
    module = cls.from_config({k: v for k, v in config.items() if not k.startswith("_")})
    module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    return module.to(dtype).eval()


def networks(kind: str, dtype: torch.dtype):
    """UNet and a decode function of the fixtures' sd15 or sdxl networks."""
    tensors, config = load(f"models_{kind}")
    unet = build(UNet2DConditionModel, config["unet"], tensors, "unet.", dtype)
    vae = build(AutoencoderKL, config["vae"], tensors, "vae.", dtype)

    def decode(latents):
        return vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]

    return unet, decode


def leading_timesteps(num_steps: int, num_train_timesteps: int, steps_offset: int) -> torch.Tensor:
    """Multiples of T // num_steps plus the offset, descending: 951, 901, ..., 1 for 20 of 1000."""
    return torch.arange(num_steps - 1, -1, -1) * (num_train_timesteps // num_steps) + steps_offset


def table(num_steps: int = 20, eta: float = 1.0, prediction_type: str = "epsilon") -> StepTable:
    alphas = load("ddim")[0]["alphas_cumprod"]
    return ddim_table(alphas, leading_timesteps(num_steps, 1000, 1), eta, prediction_type)


def spm() -> ClipScorer:
    def no_tokenizer(prompts):
        raise AssertionError("the fixtures bring token ids")

    tensors, config = load("models_spm")
    return ClipScorer(load_clip(tensors, time_conditioned=True, hf_config=config["clip_config"]), no_tokenizer)


def policy(unet, rank: int = 4) -> Policy:
    return Policy(unet, AdapterConfig(rank=rank), seed=0)


def conditioning(tensors: dict, dtype: torch.dtype, prefix: str = "in.") -> Cond:
    names = {"prompt_embeds": "prompt_embeds", "pooled_prompt_embeds": "text_embeds"}
    cond = {
        ours: tensors[f"{prefix}{theirs}"].to(dtype) for theirs, ours in names.items() if prefix + theirs in tensors
    }
    uncond = {
        ours: tensors[f"{prefix}negative_{theirs}"][:1].to(dtype)
        for theirs, ours in names.items()
        if prefix + theirs in tensors
    }
    if "text_embeds" in cond:
        size = torch.tensor([[64.0, 64, 0, 0, 64, 64]], dtype=dtype)
        cond["time_ids"], uncond["time_ids"] = size.expand(len(cond["text_embeds"]), -1), size
    return Cond(cond, uncond)


def seeded_draws(facts: dict) -> dict[str, torch.Tensor]:
    """The draws of a fixture that keeps only their order: the published run drew them from one seeded CPU generator.

    That this is so was checked where both are kept: all 36 draws of rollout_sd15_k4 come out bit for bit.
    """
    generator = torch.Generator().manual_seed(facts["seed"])
    make = {
        "normal": lambda shape: torch.randn(shape, generator=generator),
        "randint": lambda shape: torch.randint(0, facts["hyper"]["k"], shape, generator=generator),
        "randperm": lambda shape: torch.randperm(shape[0], generator=generator),
    }
    return {name: make[name.rsplit(".", 1)[1]](shape) for name, shape in facts["draws"]}


class RecordedDraws:
    """Hands out the fixture's draws in their order, checking that each is what is asked for."""

    def __init__(self, tensors: dict, start: int = 0):
        self.tensors, self.next = {k: v for k, v in tensors.items() if k.startswith("draw.")}, start

    def _take(self, kind: str) -> torch.Tensor:
        value = self.tensors[f"draw.{self.next:03d}.{kind}"]
        self.next += 1
        return value

    def latents(self, shape, dtype):
        x = self._take("normal").to(dtype)
        assert x.shape[1:] == shape
        return x

    def children(self, step, num_children, num_parents):
        noise = self._take("normal")
        if num_children == 1:  # (B or K B, C, H, W)
            noise = noise[None]
        assert noise.ndim == 5 and noise.shape[0] == num_children
        return {"noise": noise}

    def picks(self, steps, num_candidates):
        return (self._take("randint") for _ in steps)
