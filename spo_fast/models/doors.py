"""What each network is told, and in which shape: a door a network, the only place that knows.

Outside a door latents are (B, C, H, W), t is what the schedule says, and the output is what the table's rows expect: a
UNet's epsilon, v or sample, a flow's velocity noise - x0. A new flow model is a subclass of FlowDoor, entered in
FLOW_DOORS under the name of its network's class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from spo_fast.method.experience import Precomputed
from spo_fast.models.fuse import text_of
from spo_fast.models.fuse_transformer import transformer_text

if TYPE_CHECKING:
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import PreTrainedModel

Network: TypeAlias = "UNet2DConditionModel | SD3Transformer2DModel | FluxTransformer2DModel"
Inputs = dict[str, Tensor]
"""What a network is told of B prompts, each (B, ...)."""


class Tokens(NamedTuple):
    """Of P prompts, as each tokenizer has them."""

    ids: Sequence[Tensor]  # each (P, L) int64
    lengths: Sequence[int]  # L of each, also of those whose encoder the model lacks


class Door:
    """What all networks have."""

    beside_text: tuple[str, ...] = ()
    """Inputs that are no prompt's: told also where what is computed of the prompts is at hand."""

    def predict(
        self, network: Any, x: Tensor, t: Tensor, inputs: Inputs, text: Precomputed | None = None
    ) -> Tensor:  # (B, C, H, W), () or (B,) -> (B, C, H, W)
        """The network's output. text: what it computed of the prompts, in place of them."""
        raise NotImplementedError

    def text(self, network: Any, inputs: Inputs) -> Precomputed:
        """What a fused network computes of the prompts alone."""
        raise NotImplementedError

    def shapes(self, config: Mapping[str, Any], tokens: int) -> dict[str, tuple[int, ...]]:
        """Of what the network is told of a prompt of so many tokens."""
        raise NotImplementedError


class UNetDoor(Door):
    """SD-1.5 and SDXL."""

    def predict(
        self, network: UNet2DConditionModel, x: Tensor, t: Tensor, inputs: Inputs, text: Precomputed | None = None
    ) -> Tensor:
        """As their pipelines ask."""
        told, added = self._told(inputs) if text is None else (text, text.added)  # type: ignore[attr-defined]
        return network(x, t, encoder_hidden_states=told, added_cond_kwargs=added, return_dict=False)[0]  # type: ignore[arg-type]

    def text(self, network: UNet2DConditionModel, inputs: Inputs) -> Precomputed:
        """Keys and values of every cross-attention."""
        return text_of(network, *self._told(inputs))

    def shapes(self, config: Mapping[str, Any], tokens: int) -> dict[str, tuple[int, ...]]:
        """The prompt, and SDXL's pooled prompt and sizes."""
        found: dict[str, tuple[int, ...]] = {"prompt_embeds": (tokens, config["cross_attention_dim"])}
        if config["addition_embed_type"] == "text_time":
            width = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
            found |= {"text_embeds": (width,), "time_ids": (6,)}
        return found

    def _told(self, inputs: Inputs) -> tuple[Tensor, Inputs | None]:
        added = {name: value for name, value in inputs.items() if name != "prompt_embeds"}
        return inputs["prompt_embeds"], added or None


class FlowDoor(Door):
    """A flow's transformer. The defaults are those of a network that takes latents as they are, and 1000 sigma."""

    even_sigmas = False
    """Whether the model's own pipeline gives its scheduler evenly spaced sigmas, or lets it make them."""
    lengths: tuple[int | None, ...] = ()
    """Tokens of each tokenizer's prompts; None: as many as its encoder has positions."""
    patch = 2
    """Latent pixels beside each other in a token."""

    def embeddings(self, config: Mapping[str, Any], encoders: Sequence[PreTrainedModel], prompts: Tokens) -> Inputs:
        """What the network is told of P prompts, from each encoder and its tokens (P, L)."""
        raise NotImplementedError

    def text_tokens(self, lengths: Sequence[int]) -> int:
        """Of what the network is told, from the tokenizers' lengths."""
        return lengths[-1]

    def channels(self, config: Mapping[str, Any]) -> int:
        """Of the latents."""
        return int(config["in_channels"])

    def default_size(self, config: Mapping[str, Any], factor: int) -> int:
        """Pixels of a picture's side, if nothing is asked."""
        return int(config["sample_size"]) * factor

    def takes_guidance(self, config: Mapping[str, Any]) -> bool:
        """Whether guidance is an input of this network, of those of its class."""
        return False

    def text(self, network: Any, inputs: Inputs) -> Precomputed:
        """The embedded prompts."""
        return transformer_text(network, inputs["prompt_embeds"], inputs["pooled"])

    def shapes(self, config: Mapping[str, Any], tokens: int) -> dict[str, tuple[int, ...]]:
        """The prompt, its pooled vector, and guidance where that is an input."""
        found = {"prompt_embeds": (tokens, config["joint_attention_dim"]), "pooled": (config["pooled_projection_dim"],)}
        return found | ({"guidance": ()} if self.takes_guidance(config) else {})


class SD3Door(FlowDoor):
    """Stable Diffusion 3 and 3.5: two CLIPs side by side, T5's tokens after them; without T5 zeros."""

    lengths = (None, None, 256)

    def text_tokens(self, lengths: Sequence[int]) -> int:
        """CLIP's, and T5's after them."""
        return lengths[0] + lengths[2]

    def embeddings(self, config: Mapping[str, Any], encoders: Sequence[PreTrainedModel], prompts: Tokens) -> Inputs:
        """Both CLIPs' layers before the last, and T5's last: (P, L, joint_attention_dim); both projections: (P, D)."""
        width, (first, second, *t5) = config["joint_attention_dim"], prompts.ids
        clips = [e(row, output_hidden_states=True) for e, row in zip(encoders, (first, second), strict=False)]
        text = torch.cat([out.hidden_states[-2] for out in clips], dim=-1)
        text = F.pad(text, (0, width - text.shape[-1]))
        if len(encoders) > 2:
            more = encoders[2](t5[0])[0].to(text.dtype)
        else:
            more = text.new_zeros(len(text), prompts.lengths[2], width)
        pooled = torch.cat([out.text_embeds for out in clips], dim=-1)
        return {"prompt_embeds": torch.cat([text, more], dim=1), "pooled": pooled}

    def predict(
        self, network: SD3Transformer2DModel, x: Tensor, t: Tensor, inputs: Inputs, text: Precomputed | None = None
    ) -> Tensor:
        """As its pipeline asks: 1000 sigma, not rounded."""
        told = inputs["prompt_embeds"] if text is None else text
        pooled = inputs.get("pooled")
        return network(x, told, pooled, t.expand(len(x)), return_dict=False)[0]  # type: ignore[arg-type]


class FluxDoor(FlowDoor):
    """FLUX.1: T5's tokens, CLIP's pooled vector, guidance as an input where it was distilled; packed latents."""

    even_sigmas = True
    lengths = (None, 512)
    beside_text = ("guidance",)

    def embeddings(self, config: Mapping[str, Any], encoders: Sequence[PreTrainedModel], prompts: Tokens) -> Inputs:
        """T5's last layer (P, L, joint_attention_dim), CLIP's pooled output (P, D)."""
        pooled, text = encoders[0](prompts.ids[0]).pooler_output, encoders[1](prompts.ids[1])[0]
        return {"prompt_embeds": text.to(pooled.dtype), "pooled": pooled}

    def channels(self, config: Mapping[str, Any]) -> int:
        """A token holds 2 x 2 latent pixels."""
        return int(config["in_channels"]) // 4

    def default_size(self, config: Mapping[str, Any], factor: int) -> int:
        """1024 pixels behind the published VAE; the network's own config has none."""
        return 128 * factor

    def takes_guidance(self, config: Mapping[str, Any]) -> bool:
        """dev does, schnell does not."""
        return bool(config["guidance_embeds"])

    def predict(
        self, network: FluxTransformer2DModel, x: Tensor, t: Tensor, inputs: Inputs, text: Precomputed | None = None
    ) -> Tensor:
        """As its pipeline asks: sigma, from a timestep in the latents' type, which 16 bits round."""
        _, C, H, W = x.shape
        h, w = H // 2, W // 2
        packed = x.unflatten(2, (h, 2)).unflatten(4, (w, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        places = torch.zeros(h, w, 3, device=x.device, dtype=x.dtype)
        places[..., 1] += torch.arange(h, device=x.device)[:, None]
        places[..., 2] += torch.arange(w, device=x.device)
        told = inputs["prompt_embeds"] if text is None else text
        length = (told if isinstance(told, Tensor) else told.context).shape[1]  # type: ignore[attr-defined]
        out = network(
            hidden_states=packed,
            timestep=t.expand(len(x)).to(x.dtype) / 1000,
            guidance=inputs.get("guidance"),
            encoder_hidden_states=told,
            pooled_projections=inputs.get("pooled"),
            txt_ids=torch.zeros(length, 3, device=x.device, dtype=x.dtype),
            img_ids=places.flatten(0, 1),
            return_dict=False,
        )[0]
        return out.unflatten(1, (h, w)).unflatten(3, (C, 2, 2)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


FLOW_DOORS: dict[str, FlowDoor] = {"SD3Transformer2DModel": SD3Door(), "FluxTransformer2DModel": FluxDoor()}
UNET_DOOR = UNetDoor()


def flow_door(network: torch.nn.Module) -> FlowDoor | None:
    """Of a flow's network; None of a UNet."""
    return next((FLOW_DOORS[c.__name__] for c in type(network).__mro__ if c.__name__ in FLOW_DOORS), None)


def door_of(network: torch.nn.Module) -> Door:
    """The network's."""
    return flow_door(network) or UNET_DOOR
