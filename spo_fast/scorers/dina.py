"""DiNa-LRM (arXiv 2602.11146) as a scorer of a flow's noisy latents, and its files.

It sees children before the network does, no VAE and no estimate of x0: half of the blocks are computed for a score. The
published code judges finished pictures by adding noise up to sigma = .4; so does this, the same noise to all of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from spo_fast.data.files import as_new_files, read_json, save_tensors, shown, write_atomically
from spo_fast.data.weights import check_finite, read_tensors, some
from spo_fast.method.flow_schedule import judged_table
from spo_fast.ops.linear import take_linear
from spo_fast.scorers.dina_network import DinaReward, DinaSettings, Text

if TYPE_CHECKING:
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    from spo_fast.method.experience import Candidates, Cond

LORA, HEAD = "backbone_lora/adapter_model.safetensors", "rm_head.pt"
FINAL_SIGMA = 0.4  # of the published inference
DINA_FILES = f"a directory with config.json and {LORA} and {HEAD}, both in it or in its checkpoint/"


class FlowBase(Protocol):
    """What a judge of a flow's latents needs of the model."""

    device: torch.device

    def cond(self, prompts: list[str]) -> Cond:
        """What the network is told of prompts."""
        ...

    def fresh_network(self, dtype: torch.dtype) -> SD3Transformer2DModel:
        """The model's own network as its files have it, on the CPU; a judge takes it apart."""
        ...


class DinaScorer:
    """Noisy latents at their own sigma; finished ones with noise."""

    judges = "children"
    children_told = 1
    """Steps beyond their parent's whose timestep children are told: the network was trained on x at its own sigma."""

    def __init__(self, model: DinaReward, base: FlowBase):
        self.model, self.base = take_linear(model.requires_grad_(False).eval()), base
        self.sigmas = judged_table().noise.flip(0).to(base.device, torch.float32)  # by the timestep of equal noise

    def encode(self, prompts: list[str]) -> Text:
        """Context (P, L, C) and pooled prompts (P, D), of the diffusion model's own cache."""
        return text_of(self.base.cond(prompts))

    @torch.no_grad()
    def __call__(self, candidates: Candidates) -> Tensor:  # (K*B,) float32, k-major
        """A decode_chunk of latents at a time."""
        x, sigma = candidates.x_t, self.sigmas[candidates.t]
        if x is None:
            generator, sigma = torch.Generator().manual_seed(0), torch.full_like(sigma, FINAL_SIGMA)
            noise = torch.randn(candidates.x0.shape[1:], generator=generator).to(candidates.x0)
            x = (1 - FINAL_SIGMA) * candidates.x0 + FINAL_SIGMA * noise
        context, pooled = candidates.text
        rows = torch.arange(len(x), device=x.device).split(candidates.decode_chunk)
        return torch.cat([self.model(x[r], sigma.expand(len(r)), (context[r], pooled[r])) for r in rows])


def text_of(cond: Cond) -> Text:
    """What an SD3 is told of prompts."""
    return cond.cond["prompt_embeds"], cond.cond["pooled"]


def load_dina(
    path: Path, _: object, device: str | torch.device, dtype: torch.dtype, *, flow: FlowBase | None
) -> DinaScorer:
    """The scorer of DINA_FILES on the blocks of the model that is trained. Raises ValueError for one that is no SD3."""
    if flow is None:
        raise ValueError("scorer dina judges a flow's latents, and there is none here: leave it out.")
    return DinaScorer(load_dina_reward(path, flow, dtype).to(device), flow)


def read_settings(path: str | Path) -> DinaSettings:
    """Of a directory. Raises FileNotFoundError, ValueError."""
    return DinaSettings.read(read_json(Path(path) / "config.json").get("model", {}), shown(Path(path) / "config.json"))


def init_dina(base: FlowBase, seed: int, dtype: torch.dtype = torch.float32) -> DinaReward:
    """Where training starts: half of the network's blocks, a LoRA that changes nothing, a new head."""
    network = base.fresh_network(dtype)
    settings = DinaSettings.of_blocks(len(network.transformer_blocks), network.inner_dim)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DinaReward(network, settings).to(dtype)


def load_dina_reward(path: str | Path, base: FlowBase, dtype: torch.dtype = torch.float32) -> DinaReward:
    """From DINA_FILES, strictly. Raises FileNotFoundError, ValueError for what is missing, unexpected or misshapen."""
    path = Path(path)
    folder = path / "checkpoint" if (path / "checkpoint").is_dir() else path
    if not (folder / LORA).is_file() or not (folder / HEAD).is_file():
        raise FileNotFoundError(f"{shown(path)} is no DiNa-LRM. Expected {DINA_FILES}.")
    model = DinaReward(base.fresh_network(dtype), read_settings(path)).to(dtype)
    given = {_own(name): value for name, value in read_tensors(folder / LORA).items()}
    given |= {f"reward_head.{name}": value for name, value in read_tensors(folder / HEAD).items()}
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    odd = sorted(wanted.keys() ^ given.keys()) or [n for n, p in wanted.items() if p.shape != given[n].shape]
    if odd:
        raise ValueError(f"{shown(path)} does not fit the model's blocks and config.json: {some(odd, 120)}.")
    check_finite(given, path)
    for name, p in wanted.items():
        p.data = given[name].to(p.device, p.dtype)
    return model


def save_dina(model: DinaReward, directory: Path, weights: Mapping[str, Tensor]) -> None:
    """As the published code reads it. weights: the trained ones (float32 masters) by the model's names."""
    checkpoint = directory / "checkpoint"
    (checkpoint / LORA).parent.mkdir(parents=True, exist_ok=True)
    own = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    head = {name.removeprefix("reward_head."): v for name, v in own.items() if name.startswith("reward_head.")}
    save_tensors({_published(n): v for n, v in own.items() if n.startswith("backbone.")}, checkpoint / LORA)
    folder = (checkpoint / LORA).parent
    model.lora.save_pretrained(str(folder))
    as_new_files(folder.glob("*.safetensors"))
    torch.save(head, checkpoint / HEAD)
    config = {"model": model.settings.written(), "training": {"add_noise": True}}
    write_atomically(directory / "config.json", json.dumps(config, indent=1) + "\n")


def _published(name: str) -> str:
    return name.replace("backbone.", "base_model.model.", 1).replace(".default.", ".")


def _own(name: str) -> str:
    return name.replace("base_model.model.", "backbone.", 1).replace(".weight", ".default.weight")
