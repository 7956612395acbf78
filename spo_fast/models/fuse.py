"""Swaps forwards inside a diffusers UNet, or a VAE, for our ops.

A module's class becomes a subclass that has another `forward`, nothing else changes: parameters, their names, PEFT's
adapters and what is saved stay as they were, and what a subclass does not know is left to diffusers. What goes:
    GroupNorm, SiLU             ops.group_norm_silu, channels-last
    a gelu(g)                   ops.geglu
    base + LoRA                 ops.lora_linear; one product of the three A's where queries, keys and values share x,
                                and without gradient one of the three bases, which lie one below the other
    divisions by 1.0, copies to NCHW after each transformer
    SiLU of the time embedding in every ResNet block: once in all; frozen, the embedding is a table of the timesteps
    keys and values of the text at every step: once for the prompts, in `Text`, where no gradient flows
    nearest upsampling, its 3x3 one transposed convolution, 4x4: 16 products for 36; float32 on a CPU

SDXL's guided 16-bit forward has 1,860 operations (4,100 with its LoRA); with Triton's ops it has 1,387, with the LoRA
1,527 (tests/test_fuse.py).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.models.upsampling import Upsample2D
from peft.tuners import lora
from torch import Tensor, nn

from spo_fast.models.attention import Attend, sdpa
from spo_fast.models.fuse_transformer import TRANSFORMERS, fuse_transformer
from spo_fast.models.fused_layers import FusedLora, Projections, linears, made_again, plain_lora, saving_inputs
from spo_fast.ops import backend
from spo_fast.ops.geglu import geglu
from spo_fast.ops.group_norm_silu import group_norm_silu
from spo_fast.ops.linear import is_plain, linear, take_linear

NUM_TIMESTEPS = 1000  # of every noise schedule that these networks were trained with


class Text(NamedTuple):
    """What a fused UNet computes of its prompts alone, the same at every step."""

    pairs: list[tuple[Tensor, Tensor]]  # keys, values (B, L, D) of each cross-attention in the network's order
    added: Tensor | None  # (B, D') SDXL's pooled text and sizes, embedded


Words: TypeAlias = "Tensor | tuple[Tensor, Tensor] | None"
"""The text's embeddings, or one cross-attention's keys and values of them."""


def fuse(network: nn.Module, recompute: bool = False) -> None:
    """Swap what this module knows inside a UNet, a VAE or a transformer, in place; LoRA layers must be there already.

    recompute: norms save their inputs, which the graph holds anyway, and are computed again in the backward. Gates
    (GEGLU) always do. Called again it changes this alone.
    """
    (fuse_transformer if isinstance(network, TRANSFORMERS) else _fuse_convolutional)(network, recompute)
    take_linear(network)


def _fuse_convolutional(network: nn.Module, recompute: bool) -> None:
    dora = any("lora_magnitude_vector" in name for name, _ in network.named_parameters())
    for name, p in network.named_parameters():
        if p.ndim == 4 and not (dora and ".lora_" in name):  # PEFT's DoRA views those as matrices
            p.data = p.data.contiguous(memory_format=torch.channels_last)
    cross = 0
    for module in list(network.modules()):
        for kind, (fused, fits) in FUSED.items():
            if type(module) is kind and fits(module):
                module.__class__ = fused
        if isinstance(module, FusedUpsample) and not hasattr(module, "kernel"):
            module.fold()
        if isinstance(module, FusedTransformer):
            module.first_pair, cross = cross, cross + len(module.transformer_blocks)
        module.recompute = recompute  # type: ignore[assignment]
        if isinstance(getattr(module, "conv_act", None), nn.SiLU) and type(module.conv_norm_out) is nn.GroupNorm:
            module.conv_norm_out.__class__, module.conv_act = FusedGroupNormSiLU, nn.Identity()
    for module in network.modules():
        if isinstance(module, FusedAttention) and not hasattr(module, "projections"):
            module.attend = sdpa
            module.projections = Projections(module.to_q, module.to_k, module.to_v)
    if cross and isinstance(network, UNet2DConditionModel):
        _fuse_embeddings(network)


def _fuse_embeddings(unet: UNet2DConditionModel) -> None:
    resnets = [m for m in unet.modules() if isinstance(m, ResnetBlock2D)]
    if unet.time_embed_act is None and all(type(m) is FusedResnet for m in resnets):
        unet.time_embed_act = nn.SiLU()
        for resnet in resnets:
            resnet.skip_time_act = True
    if not isinstance(unet.get_aug_embed, functools.partial):
        unet.get_aug_embed = functools.partial(_added, unet.get_aug_embed)  # type: ignore[method-assign]
    embedding = unet.time_embedding
    if type(embedding) is TimestepEmbedding and not any(p.requires_grad for p in embedding.parameters()):
        with torch.no_grad():
            timesteps = torch.arange(NUM_TIMESTEPS, device=unet.device)
            table = embedding(unet.time_proj(timesteps).to(unet.dtype))
        embedding.register_buffer("table", table, persistent=False)
        embedding.__class__ = FusedTimeEmbedding
        unet.get_time_embed = _timesteps  # type: ignore[method-assign, assignment]


def _timesteps(sample: Tensor, timestep: Tensor) -> Tensor:
    return timestep.expand(len(sample))


def _added(
    compute: Callable[..., Tensor | None], *, added_cond_kwargs: Tensor | dict[str, Tensor] | None, **inputs: object
) -> Tensor | None:
    if isinstance(added_cond_kwargs, Tensor):
        return added_cond_kwargs
    return compute(added_cond_kwargs=added_cond_kwargs, **inputs)


@torch.no_grad()
def text_of(unet: UNet2DConditionModel, prompt_embeds: Tensor, added_cond_kwargs: dict[str, Tensor] | None) -> Text:
    """What a fused UNet computes of the prompts of B rows: for steps without gradient, until its weights change."""
    blocks = [block for m in unet.modules() if isinstance(m, FusedTransformer) for block in m.transformer_blocks]
    pairs = [block.attn2.keys_values(prompt_embeds) for block in blocks]
    like = prompt_embeds.new_empty(0)  # of the time embedding only the type is asked
    # what diffusers annotates too narrowly: SD-1.5 adds nothing, and neither adds an image
    added = unet.get_aug_embed(emb=like, encoder_hidden_states=None, added_cond_kwargs=added_cond_kwargs)  # type: ignore[arg-type]
    return Text(pairs, added)


# ---------------------------------------------------------------------------------------------------- norms


def _group_norm(module: nn.Module, norm: nn.GroupNorm, x: Tensor, silu: bool = True) -> Tensor:
    if norm.weight.requires_grad and torch.is_grad_enabled():  # a full fine-tuning: the op has no gradient for it
        x = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
        return F.silu(x) if silu else x

    def function(x: Tensor) -> Tensor:
        return group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps, silu=silu)

    return saving_inputs("group_norm_silu", function, x) if module.recompute else function(x)


@contextlib.contextmanager
def _normed(module: nn.Module, norm: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """norm(x); if the module is to recompute, what the graph inside saves of the result is made again from x."""
    y, source = norm(x), x.detach()
    with made_again(bool(module.recompute), [y], lambda: [norm(source)]):
        yield y


# ---------------------------------------------------------------------------------------------------- modules


class FusedGroupNormSiLU(nn.GroupNorm):
    """A group norm with the SiLU behind it."""

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W)
        """SiLU of the norm."""
        return _group_norm(self, self, x)


class FusedResnet(ResnetBlock2D):
    """A ResNet block whose norms and SiLUs are one op each."""

    def forward(self, x: Tensor, temb: Tensor | None = None, *_: object) -> Tensor:  # (N, C, H, W), (N, D)
        """As ResnetBlock2D's."""
        h = self.conv1(_group_norm(self, self.norm1, x))
        if self.time_emb_proj is not None:
            assert temb is not None
            h += self.time_emb_proj(temb if self.skip_time_act else F.silu(temb))[:, :, None, None]
        h = self.conv2(_group_norm(self, self.norm2, h))
        h += x if self.conv_shortcut is None else self.conv_shortcut(x)  # in place: no new memory is to be cleared
        return h


class FusedUpsample(Upsample2D):
    """Nearest upsampling by 2 and the convolution behind it as one transposed convolution.

    Of the 3x3 weights those that meet the same pixel are added up beforehand: a sum of products in another order.
    """

    conv: nn.Conv2d  # type: ignore[assignment]  # frozen
    kernel: Tensor  # (I, O, 4, 4)

    def fold(self) -> None:
        """Adds the weights up, once: kept beside them, and not saved."""
        w = self.conv.weight  # (O, I, 3, 3)
        kernel = w.new_zeros(*w.shape[:2], 4, 4)
        for i, j in itertools.product((0, 1), repeat=2):  # a pixel is seen from two rows and two columns
            kernel[:, :, i : i + 3, j : j + 3] += w.flip(2, 3)
        kernel = kernel.transpose(0, 1).contiguous(memory_format=torch.channels_last)
        self.register_buffer("kernel", kernel, persistent=False)

    def forward(self, hidden_states: Tensor, output_size: Any = None, *_: object, **__: object) -> Tensor:
        """As Upsample2D's: (N, I, H, W) -> (N, O, 2 H, 2 W), or output_size."""
        x = hidden_states
        if output_size not in (None, torch.Size(2 * side for side in x.shape[-2:])):
            return super().forward(x, output_size)
        return F.conv_transpose2d(x, self.kernel, self.conv.bias, stride=2, padding=1)


class FusedGEGLU(GEGLU):
    """The gate of a feed-forward as one op."""

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> Tensor:  # (N, L, I) -> (N, L, D)
        """As GEGLU's."""
        proj = self.proj
        if is_plain(proj) and backend.choose("geglu", hidden_states) == "c":
            # on a CPU a product writes its bias to every row before it begins; the op reads it once
            return geglu(linear(hidden_states, proj.weight), proj.bias)
        return saving_inputs("geglu", geglu, proj(hidden_states))


class FusedTimeEmbedding(TimestepEmbedding):
    """The embeddings of all timesteps, computed once: a look-up."""

    table: Tensor

    def forward(self, sample: Tensor, condition: object = None) -> Tensor:  # (N,) int64 timesteps -> (N, D)
        """The timesteps' embeddings."""
        return self.table[sample]


class FusedAttention(Attention):
    """Attention whose queries, keys and values come of one product, by the kernel that was picked."""

    attend: Attend
    projections: Projections
    """Queries, keys and values of the picture itself."""

    def keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:  # (N, L, D') -> (N, L, D) each
        """Of the text."""
        key, value = linears(text, (self.to_k, self.to_v))
        return key, value

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Words = None, attention_mask: object = None, **_: object
    ) -> Tensor:
        """hidden_states (N, L, D); encoder_hidden_states the text (N, L', D'), its keys and values, or None."""
        assert attention_mask is None
        if encoder_hidden_states is None:
            q, k, v = self.projections(hidden_states)
        else:
            q, text = self.to_q(hidden_states), encoder_hidden_states
            k, v = text if isinstance(text, tuple) else self.keys_values(text)
        q, k, v = (x.unflatten(-1, (self.heads, -1)) for x in (q, k, v))
        return self.to_out[0](self.attend(q, k, v).flatten(2))


class FusedBlock(BasicTransformerBlock):
    """A transformer block whose normed inputs are made again in the backward if it is to recompute."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: object = None,
        encoder_hidden_states: Words = None,
        *_: object,
        **__: object,
    ) -> Tensor:
        """As BasicTransformerBlock's; the text may be its keys and values."""
        h = hidden_states  # (N, L, D)
        with _normed(self, self.norm1, h) as x:
            h = h + self.attn1(x)
        with _normed(self, self.norm2, h) as x:
            h = h + self.attn2(x, encoder_hidden_states)
        with _normed(self, self.norm3, h) as x:
            return h + self.ff(x)


class FusedTransformer(Transformer2DModel):
    """A transformer that takes its keys and values of the text from Text, where they have been computed."""

    first_pair: int
    """Of the keys and values in Text.pairs: this transformer's first."""

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Words | Text = None, *_: object, **__: object
    ) -> tuple[Tensor]:
        """As Transformer2DModel's."""
        N, _C, H, W = hidden_states.shape
        h = _group_norm(self, self.norm, hidden_states, silu=False)
        if not self.use_linear_projection:
            h = self.proj_in(h)
        h = h.permute(0, 2, 3, 1).reshape(N, H * W, -1)  # a view of channels-last
        if self.use_linear_projection:
            h = self.proj_in(h)
        for i, block in enumerate(self.transformer_blocks):
            text = encoder_hidden_states
            pair = text.pairs[self.first_pair + i] if isinstance(text, Text) else text
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h = self._gradient_checkpointing_func(block, h, None, pair)
            else:
                h = block(h, None, pair)
        if self.use_linear_projection:
            h = self.proj_out(h)
        h = h.reshape(N, H, W, -1).permute(0, 3, 1, 2)
        if not self.use_linear_projection:
            h = self.proj_out(h)
        return (h + hidden_states,)


def _plain_resnet(m: ResnetBlock2D) -> bool:
    silu = isinstance(m.nonlinearity, nn.SiLU)
    resized = m.upsample is not None or m.downsample is not None
    added = m.time_embedding_norm == "default" or (m.time_embedding_norm == "group" and m.time_emb_proj is None)
    norms = added and type(m.norm1) is type(m.norm2) is nn.GroupNorm
    return silu and norms and not resized and m.output_scale_factor == 1 and m.dropout.p == 0


def _plain_attention(m: Attention) -> bool:
    extra = (m.group_norm, m.spatial_norm, m.norm_q, m.norm_k, m.norm_cross, m.added_kv_proj_dim)
    plain = not any(extra) and not m.residual_connection and m.rescale_output_factor == 1 and m.scale_qk
    return plain and m.to_k is not None and bool(m.to_out[1].p == 0)


def _plain_block(m: BasicTransformerBlock) -> bool:
    norms = m.norm_type == "layer_norm" and m.pos_embed is None and not hasattr(m, "fuser")
    return norms and m.attn2 is not None and not m.only_cross_attention and m._chunk_size is None


def _foldable(m: Upsample2D) -> bool:
    conv = getattr(m, "conv", None)
    if type(conv) is not nn.Conv2d or conv.weight.requires_grad or m.norm is not None or not m.interpolate:
        return False
    # rounded to 16 bits the sums would be other weights, and a GPU has tuned kernels for the 3x3
    exact = conv.weight.device.type == "cpu" and conv.weight.dtype in (torch.float32, torch.float64)
    return exact and conv.kernel_size == (3, 3) and conv.padding == (1, 1)


FUSED: dict[type, tuple[type, Callable[..., bool]]] = {
    lora.Linear: (FusedLora, plain_lora),
    GEGLU: (FusedGEGLU, lambda m: True),
    ResnetBlock2D: (FusedResnet, _plain_resnet),
    Attention: (FusedAttention, _plain_attention),
    BasicTransformerBlock: (FusedBlock, _plain_block),
    Upsample2D: (FusedUpsample, _foldable),
    Transformer2DModel: (
        FusedTransformer,
        lambda m: (
            m.is_input_continuous and all(_plain_block(b) and _plain_attention(b.attn2) for b in m.transformer_blocks)
        ),
    ),
}
"""Class of diffusers or PEFT -> ours, and whether a module is of the kind that ours computes."""
