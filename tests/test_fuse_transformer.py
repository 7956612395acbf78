"""models/fuse_transformer.py: equality with diffusers' own forwards in float64, and full sizes counted on fake tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.models import normalization
from diffusers.models.transformers import transformer_flux
from peft import LoraConfig
from torch import Tensor, nn

from spo_fast.models.fuse import fuse
from spo_fast.models.fuse_transformer import FUSED, Rotary, rotary_of, transformer_text
from spo_fast.ops.backend import available_backends, use_backend

TINY = {
    "sd3": (
        SD3Transformer2DModel,
        dict(
            sample_size=16, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=4,
            joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=16, out_channels=4,
            pos_embed_max_size=24, dual_attention_layers=(0, 1), qk_norm="rms_norm",
        ),
    ),
    "sd3 without norms": (
        SD3Transformer2DModel,
        dict(
            sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
            joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=16, out_channels=4,
            pos_embed_max_size=24,
        ),
    ),
    "flux": (
        FluxTransformer2DModel,
        dict(
            patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=16, guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        ),
    ),
    "schnell": (
        FluxTransformer2DModel,
        dict(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
        ),
    ),
}  # fmt: skip
ATTENTION = [
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
]  # fmt: skip
TARGETS = {
    "published": {
        "sd3": ATTENTION,
        "flux": [*ATTENTION, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"],
    },
    "some": {"sd3": ["attn2.to_q", "attn.to_v", "norm1.linear"], "flux": ["proj_mlp", "proj_out", "norm.linear"]},
    "everything": {"sd3": "all-linear", "flux": "all-linear"},
}


def family(kind: str) -> str:
    return "sd3" if kind.startswith("sd3") else "flux"


def build(kind: str, targets: str | None, dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    """A tiny network with random weights, norms and LoRA B's included; the same for the same arguments."""
    cls, config = TINY[kind]
    torch.manual_seed(0)
    network: Any = cls(**config).requires_grad_(False).eval()
    for module in network.modules():
        if isinstance(module, normalization.RMSNorm | nn.RMSNorm):
            module.weight.uniform_(0.5, 2.0)
    if targets is not None:
        names = TARGETS[targets][family(kind)]
        network.add_adapter(LoraConfig(r=3, lora_alpha=2, target_modules=names, init_lora_weights=False, **more))
    return network.to(dtype)


def inputs(
    kind: str, rows: int = 3, one_timestep: bool = False, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    t = torch.tensor([903.25, 411.5, 3.0])[: 1 if one_timestep else rows]
    told = {"encoder_hidden_states": draw(rows, 7, 32), "pooled_projections": draw(rows, 16)}
    if family(kind) == "sd3":
        return {"hidden_states": draw(rows, 4, 8, 12), "timestep": t, **told}
    rows_columns = torch.stack(torch.meshgrid(torch.zeros(1), torch.arange(4.0), torch.arange(6.0), indexing="ij"), -1)
    told |= {"img_ids": rows_columns.view(24, 3), "txt_ids": torch.zeros(7, 3)}
    if kind == "flux":
        told["guidance"] = torch.full((rows,), 3.5)
    return {"hidden_states": draw(rows, 24, 16), "timestep": (t / 1000).to(dtype), **told}


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers takes SD3's RMS and FLUX's rotation in float32, whatever the network is: here in the network's type."""

    def rms(self: Any, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weight

    def rotate(x: Tensor, angles: tuple[Tensor, Tensor], sequence_dim: int) -> Tensor:
        assert sequence_dim == 1
        turn = torch.complex(*(v[:, ::2].double() for v in angles))[:, None]
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)

    monkeypatch.setattr(normalization.RMSNorm, "forward", rms)
    monkeypatch.setattr(transformer_flux, "apply_rotary_emb", rotate)


def results(network: Any, told: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs without gradient, with the LoRA and without; outputs and gradients with."""
    found: dict[str, Tensor] = {}
    adapted = getattr(network, "peft_config", None) is not None
    with torch.no_grad():
        found["drawn"] = network(**told).sample
        if adapted:
            network.disable_adapters()
            found["reference"] = network(**told).sample
            network.enable_adapters()
    x = told["hidden_states"].clone().requires_grad_()
    (out,) = network(**{**told, "hidden_states": x}, return_dict=False)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype))
    found |= {"trained": out.detach(), "x": x.grad}
    for name, p in network.named_parameters():
        if p.requires_grad:
            found[name] = torch.zeros_like(p) if p.grad is None else p.grad
    return found


def error(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The largest of all parts' errors, of the part's size."""
    assert got.keys() == want.keys()
    worst = 0.0
    for name, value in got.items():
        difference, size = (value.double() - want[name].double()).norm(), want[name].double().norm()
        worst = max(worst, float(difference / size) if size > 1e-12 else float(difference))
    return worst


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("targets", [None, *TARGETS])
@pytest.mark.parametrize("kind", TINY)
def test_fused_equals_diffusers_in_float64(kind: str, targets: str | None, recompute: bool) -> None:
    plain, fused = build(kind, targets), build(kind, targets)
    fuse(fused, recompute)
    assert any(isinstance(m, tuple(FUSED.values())) for m in fused.modules())
    told = inputs(kind)
    assert error(results(fused, told), results(plain, told)) < 1e-10


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_fused_equals_diffusers_as_it_is(kind: str) -> None:
    """Its float32 roundings are of their size, in a float64 network too."""
    plain, fused, told = build(kind, "published"), build(kind, "published"), inputs(kind)
    fuse(fused)
    assert 1e-10 < error(results(fused, told), results(plain, told)) < 1e-5


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("kind", TINY)
def test_gradient_checkpointing_changes_nothing(kind: str) -> None:
    plain, fused, told = build(kind, "published"), build(kind, "published"), inputs(kind)
    fuse(fused)
    fused.enable_gradient_checkpointing()
    assert error(results(fused, told), results(plain, told)) < 1e-10


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("kind", TINY)
def test_one_timestep_or_one_a_row_guided_or_not(kind: str) -> None:
    """A batch of both halves of guidance is a batch; one timestep, of any shape, is of all its rows."""
    network = build(kind, "published")
    told = inputs(kind, one_timestep=True)
    both = {n: torch.cat([v, v.flip(0)]) if len(v) == 3 and n != "txt_ids" else v for n, v in told.items()}
    whole = {**both, "timestep": both["timestep"].expand(6)}
    want = network(**whole).sample
    fuse(network)
    for t in (both["timestep"], both["timestep"][0], whole["timestep"]):
        assert (network(**{**both, "timestep": t}).sample - want).norm() < 1e-10 * want.norm()
    apart = network(**told).sample
    assert (apart - want[:3]).norm() < 1e-10 * want.norm()


@pytest.mark.parametrize("kind", TINY)
def test_text_and_angles_computed_once(kind: str) -> None:
    """The same numbers, and another network's after its weights changed; rows of it are those rows' text."""
    network, told = build(kind, "everything", torch.float32), inputs(kind, dtype=torch.float32)
    fuse(network)
    with torch.no_grad():
        want = network(**told).sample
        text = transformer_text(network, told["encoder_hidden_states"], told["pooled_projections"])
        kept = {n: v for n, v in told.items() if n in ("hidden_states", "timestep", "guidance")}
        if family(kind) == "flux":
            kept["img_ids"] = rotary_of(network, told["txt_ids"], told["img_ids"])
            assert isinstance(kept["img_ids"], Rotary) and kept["img_ids"].table.shape == (2, 31, 8)
        assert torch.equal(network(**kept, encoder_hidden_states=text).sample, want)
        flipped = type(text)(*(v.flip(0) for v in text))
        kept["hidden_states"], kept["timestep"] = kept["hidden_states"].flip(0), kept["timestep"].flip(0)
        again = network(**kept, encoder_hidden_states=flipped).sample
        torch.testing.assert_close(again, want.flip(0), rtol=1e-4, atol=1e-5)
        network.context_embedder.lora_B["default"].weight.mul_(3)
        assert not torch.allclose(network(**told).sample, want, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_fused_errs_no_more_than_diffusers(kind: str, dtype: torch.dtype) -> None:
    plain, fused = build(kind, "published", dtype), build(kind, "published", dtype)
    truth, told = plain.double(), inputs(kind, dtype=dtype)
    exact = results(
        truth, {n: v if "ids" in n or n == "timestep" and kind == "sd3" else v.double() for n, v in told.items()}
    )
    plain = build(kind, "published", dtype)
    fuse(fused)
    assert error(results(fused, told), exact) <= 2 * error(results(plain, told), exact) + 1e-5


@pytest.mark.skipif("triton" not in available_backends("ada_norm"), reason="Triton needs TRITON_INTERPRET=1 on a CPU")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", TINY)
def test_tritons_ops_in_a_network(kind: str, recompute: bool) -> None:
    network, told = build(kind, "published", torch.float32), inputs(kind, dtype=torch.float32)
    want = results(network, told)
    fuse(network, recompute)
    with use_backend("triton"):
        found = results(network, told)
        network.zero_grad()
    assert error(found, {n: v.clone() for n, v in want.items()}) < 1e-4


def test_nothing_that_is_saved_changes() -> None:
    for kind in ("sd3", "flux"):
        plain, fused = build(kind, "published"), build(kind, "published")
        fuse(fused)
        fuse(fused, recompute=True)
        assert plain.state_dict().keys() == fused.state_dict().keys() and type(plain) is type(fused)
        for name, value in plain.state_dict().items():
            assert torch.equal(value, fused.state_dict()[name]), name
        assert plain.config == fused.config
        assert plain.peft_config["default"].to_dict() == fused.peft_config["default"].to_dict()


def test_what_is_not_as_published_keeps_diffusers_blocks() -> None:
    plain, odd = build("sd3", "published"), build("sd3", "published")
    for network in (plain, odd):
        network.transformer_blocks[1].set_chunk_feed_forward(1, 1)
    fuse(odd)
    assert not any(isinstance(m, tuple(FUSED.values())) for m in odd.modules())
    told = inputs("sd3")
    assert error(results(odd, told), results(plain, told)) < 1e-10


def test_what_a_fused_transformer_does_not_take() -> None:
    sd3, flux = build("sd3", None), build("flux", None)
    fuse(sd3)
    fuse(flux)
    with pytest.raises(ValueError, match="takes no joint_attention_kwargs"):
        sd3(**inputs("sd3"), joint_attention_kwargs={"scale": 0.5})
    with pytest.raises(ValueError, match="takes no controlnet_block_samples"):
        flux(**inputs("flux"), controlnet_block_samples=[torch.zeros(1)])
    with pytest.raises(ValueError, match="takes a guidance"):
        flux(**{n: v for n, v in inputs("flux").items() if n != "guidance"})
