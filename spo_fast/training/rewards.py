"""The preference models of a run: the one that is trained as it begins, those it is compared with, and the labeller."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from spo_fast.config.preference import PreferenceConfig
from spo_fast.data.files import shown, weight_files
from spo_fast.data.weights import check_finite, read_tensors
from spo_fast.models.diffusion import DTYPES, DiffusionModel
from spo_fast.models.files.load import load_text_encoders, load_unet
from spo_fast.models.flow import FlowModel
from spo_fast.models.tensor_cache import fingerprint_files
from spo_fast.scorers.clip_files import find_weights, init_identity_time_conditioning, load_any_clip
from spo_fast.scorers.dina import init_dina, load_dina_reward
from spo_fast.scorers.latent_files import init_latent_reward, load_latent_reward
from spo_fast.scorers.spm import ClipScorer, check_vocabulary, load_pickscore
from spo_fast.training.flow_preference_model import FlowLatentReward
from spo_fast.training.preference_model import NoisyLatentReward, PixelReward, Reward


class Rewards:
    """Makes preference models as a run's settings have them."""

    def __init__(self, cfg: PreferenceConfig, model: DiffusionModel):
        self.cfg, self.model, self.resolved, self.device = cfg, model, model.resolved, model.device
        self.start_path = cfg.reward.init_path or self.resolved.scorer_paths.get("pickscore")

    def initial(self) -> Reward:
        """What training starts from: --init_path, PickScore, or for latents the diffusion model's own encoders."""
        cfg = self.cfg.reward
        if cfg.parameterisation == "pixel":
            assert self.start_path is not None
            return self.pixel(self.start_path, cfg.time_conditioned)
        if isinstance(self.model, FlowModel):
            return self.of_flow(self.model)
        if cfg.init_path is not None:
            network = load_latent_reward(cfg.init_path, device=self.device).train()
        else:
            path = self.resolved.scorer_paths.get("text_projection")
            projection = None if path is None else read_projection(path)
            wide = torch.float32  # masters begin with what the files hold, not with its rounding
            unet, encoders = load_unet(self.resolved, wide), load_text_encoders(self.resolved, wide)
            unet.to(self.device)  # type: ignore[arg-type]  # diffusers' decorator hides what `to` takes
            network = init_latent_reward(unet, encoders, text_projection=projection, seed=self.cfg.run.seed)
        start = _cast(network, DTYPES[cfg.reward_dtype])
        if cfg.reward_checkpointing:
            network.unet.enable_gradient_checkpointing()
        reward = NoisyLatentReward(network, self.model, cfg.train_guidance_scale)
        reward.weights.load_state_dict(start)
        return reward

    def of_flow(self, model: FlowModel) -> FlowLatentReward:
        """A latent judge of the flow's own blocks: new, or that of --init_path."""
        cfg = self.cfg.reward
        if cfg.init_path is None:
            network = init_dina(model, self.cfg.run.seed)
        else:
            network = load_dina_reward(cfg.init_path, model)
        network = network.to(self.device)
        start = _cast(network, DTYPES[cfg.reward_dtype])
        reward = FlowLatentReward(network.train(), model)
        reward.weights.load_state_dict(start)
        return reward

    def pixel(self, path: str | Path, time_conditioned: bool | None) -> PixelReward:
        """A CLIP from a file, given time conditioning if that is wanted (None: as it is)."""
        clip = check_vocabulary(load_any_clip(path, device=self.device), self.model.tokenize, path)
        if time_conditioned and not clip.config.time_conditioned:
            clip = init_identity_time_conditioning(clip, self.cfg.run.seed)
        elif time_conditioned is False and clip.config.time_conditioned:
            raise ValueError(f"{path} is step-aware, but time_conditioned is off: start from a plain CLIP.")
        start = {name: p.detach() for name, p in clip.named_parameters()}
        clip.set_compute_dtype(DTYPES[self.cfg.reward.reward_dtype])
        clip.vision_model.encoder.recompute = self.cfg.reward.reward_checkpointing
        reward = PixelReward(clip, self.model, self.cfg.reward.train_guidance_scale, self.cfg.model.images_per_decode)
        reward.weights.load_state_dict(start)  # masters begin with what the file holds, not with its rounding
        return reward

    def compared(self) -> dict[str, Reward]:
        """What training started from if that is a plain CLIP, and those of compare_with."""
        found: dict[str, Reward] = {}
        if self.cfg.reward.parameterisation == "pixel":
            assert self.start_path is not None
            initial = self.pixel(self.start_path, None)
            if not initial.clip.config.time_conditioned:
                found["initial"] = initial
        for entry in self.cfg.run.compare_with:
            name, path = entry.split("=", 1)
            found[name] = self.pixel(path, None)
        return found

    def check_compared(self) -> None:
        """Raises for a wrong path of compare_with now, not when the training is done."""
        for entry in self.cfg.run.compare_with:
            find_weights(Path(entry.split("=", 1)[1]))

    def labeller(self) -> tuple[ClipScorer | None, str]:
        """PickScore, if it gives the labels, and what its features depend on."""
        if self.cfg.pairs.relabel != "pickscore":
            return None, ""
        path = self.resolved.scorer_paths["pickscore"]
        scorer = load_pickscore(path, self.model.tokenize, self.device)
        return scorer, fingerprint_files(weight_files(find_weights(path)))


def _cast(network: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """In place, but for a logit_scale; returns what trains as it was."""
    start = {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}
    for name, p in network.named_parameters():
        p.data = p.data.to(torch.float32 if name == "logit_scale" else dtype)
    return start


def read_projection(path: Path) -> Tensor:  # (D, width)
    """The text projection of a whole CLIP."""
    file, name = find_weights(path), "text_projection.weight"
    found = {key: value for key, value in read_tensors(file).items() if key == name}
    if not found:
        raise ValueError(f"{shown(file)} has no {name}: give a whole CLIP ViT-L/14 (--text_projection_path).")
    check_finite(found, file)
    return found[name]
