"""Swaps forwards inside diffusers' SD3 and FLUX transformers for our ops, as fuse.py does inside a UNet. What goes:
    residual + gate y, layer norm, 1 + scale, shift     ops.ada_norm: one pass; a block hands what it adds to its stream
                                                        to the next block's norm (Pending)
    RMS norms of q and k, rotary embedding, copies that
    join text and picture                               ops.joint_heads
    GELU, and its copy beside the attention's output    ops.gelu_tanh
    base + LoRA                                         ops.lora_linear; queries, keys and values in one product
    SiLU of the embedding in every norm: once in all
    FLUX's joining and parting of text and picture around every single block: once in all
    what depends on the prompts alone, at every step: once, in `TransformerText`

The calling convention stays diffusers', with the latter in place of encoder_hidden_states.
SD3.5-medium's 16-bit forward has 2,300 operations (3,111 with its LoRA), with Triton's ops 646 (645); FLUX.1-dev's
3,776 (5,144) and 924 (962): tests/test_fuse_transformer.py.
"""

# diffusers' modules say of their parts that they are tensors or modules
# mypy: disable-error-code="explicit-any"
from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from diffusers.models.activations import GELU
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformer2DModel,
    FluxTransformerBlock,
)
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from peft.tuners import lora
from torch import Tensor, nn

from spo_fast.models.attention import Attend, sdpa
from spo_fast.models.fused_layers import FusedLora, Projections, made_again, plain_lora, saving_inputs
from spo_fast.ops import backend
from spo_fast.ops.ada_norm import ada_norm
from spo_fast.ops.gelu_tanh import gelu_tanh
from spo_fast.ops.joint_heads import Stream, joint_heads, joint_heads_ref

TRANSFORMERS = (SD3Transformer2DModel, FluxTransformer2DModel)
EPS = 1e-6  # of every norm inside a block


class TransformerText(NamedTuple):
    """What a fused transformer computes of its prompts alone, the same at every step."""

    context: Tensor  # (B, T, D)
    pooled: Tensor  # (B, D)


class Pending(NamedTuple):
    """A stream h = x + gate y, not yet added up: the next norm does it in passing."""

    x: Tensor  # (B, L, D)
    gate: Tensor | None = None  # (B, D)
    y: Tensor | None = None  # (B, L, D)

    @property
    def residuals(self) -> list[tuple[Tensor, Tensor]]:
        """For ada_norm."""
        return [] if self.gate is None or self.y is None else [(self.gate, self.y)]

    def settled(self) -> Tensor:
        """h."""
        return self.x if self.gate is None or self.y is None else torch.addcmul(self.x, self.gate[:, None], self.y)


Flow: TypeAlias = "Tensor | Pending"


def _pending(stream: Flow) -> Pending:
    return stream if isinstance(stream, Pending) else Pending(stream)


# ---------------------------------------------------------------------------------------------------- fuse


def fuse_transformer(network: nn.Module, recompute: bool = False) -> None:
    """As fuse.fuse. A transformer of which some part is not as published keeps diffusers' blocks, its LoRA fused."""
    for module in list(network.modules()):
        if type(module) is lora.Linear and plain_lora(module):
            module.__class__ = FusedLora
    blocks = [m for m in network.modules() if isinstance(m, BLOCKS)]
    if all(isinstance(block, tuple(FUSED.values())) or PLAIN[type(block)](block) for block in blocks):
        for block in blocks:
            block.__class__ = FUSED.get(type(block), type(block))
            block.recompute = recompute  # type: ignore[assignment]
        for module in list(network.modules()):
            if type(module) in FUSED_ATTENTION:
                module.__class__ = FUSED_ATTENTION[type(module)]
                module.stack()  # type: ignore[operator]
        if "forward" not in vars(network):  # its class stays, which is what is written into its config
            forward = sd3_forward if isinstance(network, SD3Transformer2DModel) else flux_forward
            network.forward = types.MethodType(forward, network)


@torch.no_grad()
def transformer_text(
    transformer: Any,  # fused
    encoder_hidden_states: Tensor,  # (B, T, D')
    pooled_projections: Tensor,  # (B, P)
) -> TransformerText:
    """What it computes of the prompts of B rows: for steps without gradient, until its weights change."""
    return _text(transformer, encoder_hidden_states, pooled_projections)


def _text(network: Any, text: Tensor | TransformerText, pooled: Tensor | None) -> TransformerText:
    if isinstance(text, TransformerText):
        return text
    return TransformerText(network.context_embedder(text), network.time_text_embed.text_embedder(pooled))


# ---------------------------------------------------------------------------------------------------- attention


class _Fused:
    """Of SD3's and FLUX's attention, whose parts have the same names."""

    attend: Attend
    own: Projections
    added: Projections | None
    heads: int
    to_q: Any
    to_k: Any
    to_v: Any
    to_out: Any
    to_add_out: Any
    norm_q: Any
    norm_k: Any
    norm_added_q: Any
    norm_added_k: Any
    added_kv_proj_dim: int | None
    add_q_proj: Any
    add_k_proj: Any
    add_v_proj: Any

    def stack(self) -> None:
        """Once all LoRA layers are fused."""
        self.attend = sdpa
        self.own = Projections(self.to_q, self.to_k, self.to_v)
        text = self.added_kv_proj_dim is not None
        self.added = Projections(self.add_q_proj, self.add_k_proj, self.add_v_proj) if text else None

    def streams(self, picture: Tensor, text: Tensor | None) -> list[Stream]:
        """Queries, keys and values of both, the text first."""
        mine = Stream(*self.own(picture), *_weights(self.norm_q, self.norm_k))
        if text is None:
            return [mine]
        assert self.added is not None
        return [Stream(*self.added(text), *_weights(self.norm_added_q, self.norm_added_k)), mine]

    def over(self, streams: list[Stream], rotary: Tensor | None, recompute: bool) -> Tensor:  # (B, S, D)
        """Attention of all tokens to all."""
        heads = self.heads

        def turned(qs: Sequence[Tensor], name: str) -> Tensor:
            """Queries or keys of all streams."""
            of = [Stream(x, x, x, *[getattr(s, f"weight_{name}")] * 2) for x, s in zip(qs, streams, strict=True)]
            return joint_heads_ref(of, heads, rotary, EPS)[0]

        frozen = all(w is None or not w.requires_grad for s in streams for w in s[3:])
        eager = backend.choose("joint_heads", streams[0].q) == "eager"
        if not frozen:
            q, k, v = joint_heads_ref(streams, heads, rotary, EPS)
        elif recompute and eager:
            q = saving_inputs("joint_heads", lambda *xs: turned(xs, "q"), *(s.q for s in streams))
            k = saving_inputs("joint_heads", lambda *xs: turned(xs, "k"), *(s.k for s in streams))
            v = streams[0].v if len(streams) == 1 else torch.cat([s.v for s in streams], 1)
            v = v.unflatten(-1, (heads, -1))
        else:
            q, k, v = joint_heads(streams, heads, rotary, EPS)
        sources = [s._replace(q=s.q.detach(), k=s.k.detach(), v=s.v.detach()) for s in streams]
        made = len(streams) > 1 or streams[0].weight_q is not None or rotary is not None  # else views of the product
        with made_again(recompute and made, [q, k], lambda: joint_heads(sources, heads, rotary, EPS)[:2]):
            return self.attend(q, k, v).flatten(2)


class FusedAttention(_Fused, Attention):  # type: ignore[misc]
    """SD3's."""


class FusedFluxAttention(_Fused, FluxAttention):  # type: ignore[misc]
    """FLUX's."""


def _weights(*norms: Any) -> list[Tensor | None]:
    return [None if norm is None else norm.weight for norm in norms]


def _out(layer: nn.Module, x: Tensor, recompute: bool) -> Tensor:
    """A layer of some tokens of x."""
    mine, source = x.contiguous(), x.detach()
    with made_again(recompute and not x.is_contiguous(), [mine], lambda: [source.contiguous()]):
        return layer(mine)


# ---------------------------------------------------------------------------------------------------- blocks


def _feed_forward(ff: Any, h: Tensor, shift: Tensor, scale: Tensor, n: Tensor, recompute: bool) -> Tensor:
    """Of n, the norm of h."""
    source = h.detach()
    with made_again(recompute, [n], lambda: ada_norm(source, [(shift, scale)])[1:]):
        z = ff.net[0].proj(n)
    y, z_source = gelu_tanh(z), z.detach()
    with made_again(recompute, [y], lambda: [gelu_tanh(z_source)]):
        return ff.net[2](y)


class _DoubleBlock:
    """Of SD3 and FLUX, whose parts have the same names: text and picture with weights of their own."""

    recompute: bool
    norm1: Any
    norm1_context: Any
    attn: Any
    attn2: Any
    ff: Any
    ff_context: Any

    def forward(
        self,
        hidden_states: Flow,
        encoder_hidden_states: Flow,
        temb: Tensor,  # (B, D), SiLU behind it
        image_rotary_emb: Tensor | None = None,
    ) -> tuple[Flow | None, Flow]:  # text, picture
        """As diffusers' blocks."""
        picture, text, again = _pending(hidden_states), _pending(encoder_hidden_states), self.recompute
        shift, scale, gate, ff_shift, ff_scale, ff_gate, *second = _modulations(self.norm1, temb)
        norms = [(shift, scale), (second[0], second[1])] if second else [(shift, scale)]
        h, *ns = ada_norm(picture.x, norms, picture.residuals)
        last = getattr(self, "context_pre_only", False)
        if last:
            c_scale, c_shift = self.norm1_context.linear(temb).chunk(2, 1)
        else:
            c_shift, c_scale, c_gate, c_ff_shift, c_ff_scale, c_ff_gate = _modulations(self.norm1_context, temb)
        c, cn = ada_norm(text.x, [(c_shift, c_scale)], text.residuals)

        sources = h.detach(), c.detach()
        made = [cn, *ns]
        with made_again(
            again, made, lambda: [ada_norm(sources[1], [(c_shift, c_scale)])[1], *ada_norm(sources[0], norms)[1:]]
        ):
            streams = self.attn.streams(ns[0], cn)
            own = self.attn2.streams(ns[1], None) if second else []
        out = self.attn.over(streams, image_rotary_emb, again)
        T = cn.shape[1]
        residuals = [(gate, _out(self.attn.to_out[0], out[:, T:], again))]
        if second:
            out_2 = self.attn2.over(own, None, again)
            residuals.append((second[2], self.attn2.to_out[0](out_2)))
        h, n = ada_norm(h, [(ff_shift, ff_scale)], residuals)
        picture = Pending(h, ff_gate, _feed_forward(self.ff, h, ff_shift, ff_scale, n, again))
        if last:
            return None, picture
        residuals = [(c_gate, _out(self.attn.to_add_out, out[:, :T], again))]
        c, cn = ada_norm(c, [(c_ff_shift, c_ff_scale)], residuals)
        text = Pending(c, c_ff_gate, _feed_forward(self.ff_context, c, c_ff_shift, c_ff_scale, cn, again))
        return text, picture


class FusedJointBlock(_DoubleBlock, JointTransformerBlock):  # type: ignore[misc]
    """SD3's."""


class FusedFluxBlock(_DoubleBlock, FluxTransformerBlock):  # type: ignore[misc]
    """FLUX's."""

    def forward(self, *args: Any) -> tuple[Flow | None, Flow]:  # type: ignore[override]
        """As FluxTransformerBlock's, which in float16 keeps the text finite."""
        text, picture = super().forward(*args)
        return _finite(text), picture  # type: ignore[arg-type]  # FLUX's text goes on to the end


class FusedFluxSingleBlock(FluxSingleTransformerBlock):
    """Text and picture are one stream, attention and feed-forward side by side."""

    recompute: bool
    norm: Any
    attn: Any

    def forward(  # type: ignore[override]
        self, stream: Flow, temb: Tensor, image_rotary_emb: Tensor
    ) -> Flow:
        """The stream (B, T + L, D) after this block; temb has SiLU behind it."""
        stream, again = _pending(stream), self.recompute
        shift, scale, gate = self.norm.linear(temb).chunk(3, 1)
        h, n = ada_norm(stream.x, [(shift, scale)], stream.residuals)
        source = h.detach()
        with made_again(again, [n], lambda: ada_norm(source, [(shift, scale)])[1:]):
            streams, z = self.attn.streams(n, None), self.proj_mlp(n)
        out = self.attn.over(streams, image_rotary_emb, again)
        y, sources = gelu_tanh(z, before=out), (z.detach(), out.detach())
        with made_again(again, [y], lambda: [gelu_tanh(sources[0], before=sources[1])]):
            return _finite(Pending(h, gate, self.proj_out(y)))


def _modulations(norm: Any, temb: Tensor) -> Sequence[Tensor]:
    """The columns of one matrix: shift, scale, gate of attention, of feed-forward, and of a second attention."""
    columns = norm.linear(temb)
    return columns.split(temb.shape[1], 1)


def _finite(stream: Flow) -> Flow:
    """In float16 diffusers cuts a stream off at the largest number; other types reach farther."""
    if not isinstance(stream, Pending) or stream.x.dtype != torch.float16:
        return stream
    largest = torch.finfo(torch.float16).max
    return Pending(stream.settled().clip(-largest, largest))


# ---------------------------------------------------------------------------------------------------- networks


def _refuse(unknown: dict[str, object]) -> None:
    for name, value in unknown.items():
        if value:
            raise ValueError(f"a fused transformer takes no {name}: call it before fuse, or leave it out")


def _embedding(network: Any, timestep: Tensor, guidance: Tensor | None, pooled: Tensor) -> Tensor:  # (B, D)
    """SiLU of the embeddings of time (B,), (1,) or (), guidance and pooled text, which every norm reads."""
    embed, dtype = network.time_text_embed, pooled.dtype
    found = embed.timestep_embedder(embed.time_proj(timestep.reshape(-1)).to(dtype))
    if guidance is not None:
        found = found + embed.guidance_embedder(embed.time_proj(guidance.reshape(-1)).to(dtype))
    return F.silu(found + pooled)


def _run(network: Any, block: Any, *args: object) -> Any:
    """A block, whose streams are added up where they are all that is kept of it."""
    if not (network.gradient_checkpointing and torch.is_grad_enabled()):
        return block(*args)
    out = network._gradient_checkpointing_func(block, *args)
    if isinstance(out, Pending):
        return out.settled()
    return tuple(stream.settled() if isinstance(stream, Pending) else stream for stream in out)


def _norm_out(network: Any, stream: Pending, temb: Tensor) -> Tensor:
    scale, shift = network.norm_out.linear(temb).chunk(2, 1)
    return network.proj_out(ada_norm(stream.x, [(shift, scale)], stream.residuals)[1])


def _output(sample: Tensor, return_dict: bool) -> Transformer2DModelOutput | tuple[Tensor]:
    return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


def sd3_forward(
    self: SD3Transformer2DModel,
    hidden_states: Tensor,  # (B, C, H, W)
    encoder_hidden_states: Tensor | TransformerText,
    pooled_projections: Tensor | None = None,  # (B, P), unless the text is computed
    timestep: Tensor | None = None,  # (B,), (1,) or ()
    *,
    return_dict: bool = True,
    **unknown: object,
) -> Transformer2DModelOutput | tuple[Tensor]:
    """As SD3Transformer2DModel's."""
    _refuse(unknown)
    assert timestep is not None
    B, _, H, W = hidden_states.shape
    told = _text(self, encoder_hidden_states, pooled_projections)
    temb = _embedding(self, timestep, None, told.pooled)
    picture: Flow = self.pos_embed(hidden_states).contiguous()
    text: Flow = told.context
    for block in self.transformer_blocks:
        text, picture = _run(self, block, picture, text, temb)  # type: ignore[misc]
    p, out = self.config["patch_size"], _norm_out(self, _pending(picture), temb)
    out = out.view(B, H // p, W // p, p, p, -1).permute(0, 5, 1, 3, 2, 4)
    return _output(out.reshape(B, -1, H // p * p, W // p * p), return_dict)


def flux_forward(
    self: FluxTransformer2DModel,
    hidden_states: Tensor,  # (B, L, C) packed
    encoder_hidden_states: Tensor | TransformerText,
    pooled_projections: Tensor | None = None,
    timestep: Tensor | None = None,  # (B,), (1,) or ()
    img_ids: Tensor | None = None,  # (L, 3)
    txt_ids: Tensor | None = None,  # (T, 3)
    guidance: Tensor | None = None,  # (B,), (1,) or ()
    *,
    return_dict: bool = True,
    **unknown: object,
) -> Transformer2DModelOutput | tuple[Tensor]:
    """As FluxTransformer2DModel's."""
    _refuse(unknown)
    assert timestep is not None and txt_ids is not None and img_ids is not None
    cos_sin = self.pos_embed(torch.cat([v[0] if v.ndim == 3 else v for v in (txt_ids, img_ids)]))
    rotary = torch.stack([v[:, ::2] for v in cos_sin])  # (2, T + L, D / 2) float32
    told = _text(self, encoder_hidden_states, pooled_projections)
    picture: Flow = self.x_embedder(hidden_states)
    dtype, guided = picture.dtype, hasattr(self.time_text_embed, "guidance_embedder")  # type: ignore[union-attr]
    if guided != (guidance is not None):
        raise ValueError(f"this transformer takes {'a' if guided else 'no'} guidance (guidance_embeds={guided})")
    timestep, guidance = (None if v is None else v.to(dtype) * 1000 for v in (timestep, guidance))
    temb = _embedding(self, timestep, guidance, told.pooled)  # type: ignore[arg-type]
    text: Flow = told.context
    T = told.context.shape[1]
    for block in self.transformer_blocks:
        text, picture = _run(self, block, picture, text, temb, rotary)  # type: ignore[misc]
    stream: Flow = torch.cat([_pending(text).settled(), _pending(picture).settled()], 1)
    for block in self.single_transformer_blocks:
        stream = _run(self, block, stream, temb, rotary)  # type: ignore[assignment]
    x, gate, y = _pending(stream)
    return _output(_norm_out(self, Pending(x[:, T:], gate, None if y is None else y[:, T:]), temb), return_dict)


# ---------------------------------------------------------------------------------------------------- what fits


def _plain_attention(m: Any) -> bool:
    names = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
    norms = [norm for norm in (getattr(m, name, None) for name in names) if norm is not None]
    known = all(
        isinstance(norm, RMSNorm | nn.RMSNorm) and norm.eps == EPS and norm.weight is not None for norm in norms
    )
    pairs = all(
        (getattr(m, f"{a}q", None) is None) == (getattr(m, f"{a}k", None) is None) for a in ("norm_", "norm_added_")
    )
    same = m.added_kv_proj_dim is None or (m.norm_q is None) == (m.norm_added_q is None)
    processor = type(m.processor) in (JointAttnProcessor2_0, FluxAttnProcessor)
    dropped = getattr(m, "to_out", None) is not None and m.to_out[1].p != 0
    return known and pairs and same and processor and not dropped and not getattr(m, "fused_projections", False)


def _plain_ff(m: Any) -> bool:
    if m is None:
        return True
    gelu = type(m.net[0]) is GELU and m.net[0].approximate == "tanh"
    return gelu and len(m.net) == 3 and m.net[1].p == 0


def _plain_double(m: Any) -> bool:
    attentions = all(_plain_attention(a) for a in (m.attn, getattr(m, "attn2", None)) if a is not None)
    return attentions and _plain_ff(m.ff) and _plain_ff(m.ff_context) and getattr(m, "_chunk_size", None) is None


FUSED: dict[type, type] = {
    JointTransformerBlock: FusedJointBlock,
    FluxTransformerBlock: FusedFluxBlock,
    FluxSingleTransformerBlock: FusedFluxSingleBlock,
}
FUSED_ATTENTION: dict[type, type] = {Attention: FusedAttention, FluxAttention: FusedFluxAttention}
BLOCKS = tuple(FUSED)
PLAIN: dict[type, Callable[[Any], bool]] = {
    JointTransformerBlock: _plain_double,
    FluxTransformerBlock: _plain_double,
    FluxSingleTransformerBlock: lambda m: _plain_attention(m.attn),
}
"""Class of a block -> whether a block is of the kind that ours computes."""
