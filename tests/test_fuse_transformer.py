"""models/fuse_transformer.py: equality with diffusers' own forwards in float64; full sizes counted on fake tensors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.models import normalization
from diffusers.models.transformers import transformer_flux
from peft import LoraConfig
from test_fuse import CountOps
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from spo_fast.models.accelerate import blank_forward
from spo_fast.models.attention import sdpa, shapes_of
from spo_fast.models.compile import compile_network
from spo_fast.models.fuse import fuse
from spo_fast.models.fuse_transformer import FUSED, transformer_text
from spo_fast.models.merged import MergedWeights
from spo_fast.ops import backend
from spo_fast.ops.backend import available_backends, use_backend
from spo_fast.training.plan.counters import CountFlops, LiveStorage

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
    """Outputs without gradient, with the LoRA and without, and what `trained` says."""
    found: dict[str, Tensor] = {}
    adapted = getattr(network, "peft_config", None) is not None
    with torch.no_grad():
        found["drawn"] = network(**told).sample
        if adapted:
            network.disable_adapters()
            found["reference"] = network(**told).sample
            network.enable_adapters()
    return found | trained(network, told)


def trained(network: Any, told: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients; of what no gradient reaches, zeros."""
    network.zero_grad()
    x = told["hidden_states"].clone().requires_grad_()
    (out,) = network(**{**told, "hidden_states": x}, return_dict=False)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype))
    found = {"trained": out.detach(), "x": x.grad}
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
def test_text_computed_once(kind: str) -> None:
    """The same numbers, and another network's after its weights changed; rows of it are those rows' text."""
    network, told = build(kind, "everything", torch.float32), inputs(kind, dtype=torch.float32)
    fuse(network)
    with torch.no_grad():
        want = network(**told).sample
        text = transformer_text(network, told["encoder_hidden_states"], told["pooled_projections"])
        kept = {n: v for n, v in told.items() if n not in ("encoder_hidden_states", "pooled_projections")}
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


@pytest.mark.slow
@pytest.mark.skipif("triton" not in available_backends("ada_norm"), reason="Triton needs TRITON_INTERPRET=1 on a CPU")
@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_tritons_ops_in_a_network(kind: str) -> None:
    """One row, trained: the interpreter takes a millisecond for every token and kernel."""
    network, told = build(kind, "published", torch.float32), inputs(kind, rows=1, dtype=torch.float32)
    want = trained(network, told)
    fuse(network, recompute=True)
    with use_backend("triton"):
        assert error(trained(network, told), want) < 1e-4


@pytest.mark.slow
@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_blocks_compile_without_a_graph_break(kind: str) -> None:
    """Each kind of block once for its first stream, which is added up, and once for those that are not yet."""
    plain, fused, told = build(kind, "published"), build(kind, "published"), inputs(kind)
    fuse(fused, recompute=True)  # a compiler decides by itself
    torch._dynamo.reset()
    compile_network(fused, "regional", backend="aot_eager")
    assert error(trained(fused, told), trained(plain, told)) < 1e-10


@pytest.mark.parametrize(
    ("kind", "latents", "want"),
    [
        ("sd3", (4, 8, 12), {((2, 31, 4, 8),) * 2: 3, ((2, 24, 4, 8),) * 2: 2}),
        ("flux", (4, 8, 12), {((2, 31, 2, 16),) * 2: 4}),
        ("schnell", (4, 8, 12), {((2, 31, 2, 16),) * 2: 3}),
    ],
)
def test_shapes_of_attention(kind: str, latents: tuple[int, ...], want: dict[Any, int]) -> None:
    network = build(kind, "published", torch.float32)
    fuse(network)
    assert shapes_of(network, blank_forward(network, 2, latents, 7)) == want
    assert all(m.attend is sdpa for m in network.modules() if hasattr(m, "attend"))


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_copies_and_merged_weights(kind: str) -> None:
    """A copy of a fused network computes with its own weights; merged ones are those of the layers, one by one."""
    network, told = build(kind, "published", torch.float32), inputs(kind, dtype=torch.float32)
    want = network(**told).sample.detach()
    fuse(network)
    other = copy.deepcopy(network)
    masters = dict(network.named_parameters())
    merged = MergedWeights(network, masters)
    merged.merge(seed=0, iteration=0)
    with torch.no_grad():
        other.transformer_blocks[0].attn.to_q.base_layer.weight.zero_()
        other.transformer_blocks[0].attn.to_k.lora_B["default"].weight.zero_()
        torch.testing.assert_close(network(**told).sample, want, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(other(**told).sample, want, atol=1e-3)
        network.disable_adapters()
        with merged.swapped_in():
            torch.testing.assert_close(network(**told).sample, want, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(network(**told).sample, want, atol=1e-3)


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


# ------------------------------------------------------------------------------------------------- full size

FULL: dict[str, tuple[Any, dict[str, Any]]] = {
    "sd3": (
        SD3Transformer2DModel,  # SD3.5-medium
        dict(
            sample_size=128, patch_size=2, in_channels=16, num_layers=24, attention_head_dim=64,
            num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
            out_channels=16, pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
        ),
    ),
    "flux": (
        FluxTransformer2DModel,  # FLUX.1-dev
        dict(
            patch_size=1, in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128,
            num_attention_heads=24, joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True,
        ),
    ),
}  # fmt: skip
LORA_RANK = {"sd3": 32, "flux": 64}
TEXT = {"sd3": 333, "flux": 512}  # tokens
PICTURE = 4096  # tokens of 1024 pixels


class Full:
    """A network of full size on fake tensors of 16 bits, and what it is told of some rows."""

    def __init__(self, kind: str, rows: int):
        cls, config = FULL[kind]
        with torch.device("meta"):
            network: Any = cls(**config).requires_grad_(False).eval()
            names = TARGETS["published"][kind]
            network.add_adapter(LoraConfig(r=LORA_RANK[kind], lora_alpha=2 * LORA_RANK[kind], target_modules=names))
        self.network, self.mode = network, FakeTensorMode()
        with self.mode:
            for part in network.modules():
                for name, p in part.named_parameters(recurse=False):
                    part._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=torch.bfloat16), p.requires_grad)
                for name, b in part.named_buffers(recurse=False):
                    part._buffers[name] = torch.empty(b.shape, dtype=torch.bfloat16)
            sizes = {
                "encoder_hidden_states": (TEXT[kind], 4096),
                "pooled_projections": (config["pooled_projection_dim"],),
            }
            sizes["hidden_states"] = (16, 128, 128) if kind == "sd3" else (PICTURE, 64)
            self.told = {n: torch.empty(rows, *shape, dtype=torch.bfloat16) for n, shape in sizes.items()}
            self.told["timestep"] = torch.empty(rows)
            if kind == "flux":
                self.told["guidance"] = torch.empty(rows)
                self.told["txt_ids"], self.told["img_ids"] = torch.empty(TEXT[kind], 3), torch.empty(PICTURE, 3)

    def fuse(self, recompute: bool = False) -> None:
        """And compute once what a rollout computes once."""
        told = self.told
        with self.mode:
            fuse(self.network, recompute)
            told["encoder_hidden_states"] = transformer_text(  # type: ignore[assignment]
                self.network, told["encoder_hidden_states"], told.pop("pooled_projections")
            )

    def forward(self) -> Tensor:
        """Its output."""
        return self.network(**self.told, return_dict=False)[0]


def use_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU runs the ops: their fake forms need none."""
    monkeypatch.setattr(backend, "choose", lambda name, like: "triton")


COUNTS = {  # operations of a forward that is drawn: diffusers', fused with PyTorch's ops, fused with Triton's
    "sd3": {"off": (2300, 1982, 646), "on": (3111, 2507, 645)},
    "flux": {"off": (3776, 3203, 924), "on": (5144, 4153, 962)},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FULL)
def test_a_forward_has_few_operations(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: dict[str, list[int]] = {"off": [], "on": []}
    full = Full(kind, rows=2)
    for how in ("diffusers", "PyTorch's ops", "Triton's ops"):
        if how == "PyTorch's ops":
            full.fuse()
        if how == "Triton's ops":
            use_triton(monkeypatch)
        for lora, row in counts.items():
            full.network.disable_adapters() if lora == "off" else full.network.enable_adapters()
            with full.mode, torch.no_grad(), CountOps() as ops:
                full.forward()
            row.append(sum(ops.seen.values()))
            print(f"\n{kind}, LoRA {lora}, {how}: {row[-1]:,}", ops.seen.most_common(14))
    for lora, (plain, composed, kernels) in counts.items():
        assert (plain, composed, kernels) == COUNTS[kind][lora]
        assert composed < plain and kernels <= 0.3 * plain


def least_flops(kind: str, picture: int = PICTURE, rank: int | None = None) -> tuple[int, int]:  # noqa: C901  a network, layer by layer
    """Of one row of so many tokens: a forward with its LoRA, and the backward of it, written out by hand.

    A frozen layer's backward is dx; a LoRA layer's besides u = dy B, u A, dA and dB; attention's takes five products
    where the forward takes two. Nothing flows into what lies before the first LoRA.
    """
    L, T, r = picture, TEXT[kind], LORA_RANK[kind] if rank is None else rank
    S = L + T
    forward = backward = 0

    def linear(tokens: int, columns: int, rows: int, lora: bool = False, dx: bool = True) -> None:
        nonlocal forward, backward
        base, low = 2 * tokens * columns * rows, 2 * tokens * r * (columns + rows)
        forward += base + lora * low
        # dA and dB; u and u A, without which no dx comes
        backward += dx * base + lora * (low + 2 * tokens * r * rows + dx * 2 * tokens * r * columns)

    def attention(tokens: int, D: int, dx: bool = True) -> None:
        nonlocal forward, backward
        product = 2 * tokens * tokens * D
        forward, backward = forward + 2 * product, backward + dx * 5 * product

    if kind == "sd3":
        D, blocks = 1536, 24
        forward += 2 * L * 64 * D + 2 * (256 * D + D * D)  # patches, time
        for i in range(blocks):
            last, first = i == blocks - 1, i == 0
            forward += 2 * D * D * ((9 if i < 13 else 6) + (2 if last else 6))
            for tokens in (L, T):
                for _ in range(3):
                    linear(tokens, D, D, lora=True, dx=not first)
                if tokens == L or not last:
                    linear(tokens, D, D, lora=True)
                    linear(tokens, D, 4 * D)
                    linear(tokens, 4 * D, D)
            attention(S, D)
            if i < 13:
                for _ in range(4):
                    linear(L, D, D, dx=not first)
                attention(L, D, dx=not first)
        forward += 2 * D * 2 * D
        linear(L, D, 64)
        return forward, backward
    D = 3072
    forward += 2 * L * 64 * D + 2 * 2 * (256 * D + D * D)  # patches; time and guidance
    for i in range(19):
        forward += 2 * D * D * 12
        for tokens in (L, T):
            for _ in range(3):
                linear(tokens, D, D, lora=True, dx=i > 0)
            linear(tokens, D, D, lora=True)
            linear(tokens, D, 4 * D, lora=True)
            linear(tokens, 4 * D, D, lora=True)
        attention(S, D)
    for _ in range(38):
        forward += 2 * D * D * 3
        for _ in range(3):
            linear(S, D, D, lora=True)
        linear(S, D, 4 * D)
        linear(S, 5 * D, D)
        attention(S, D)
    forward += 2 * D * 2 * D
    linear(L, D, 64)
    return forward, backward


@pytest.mark.slow
@pytest.mark.parametrize("kind", FULL)
def test_flops_are_the_least_possible(kind: str) -> None:
    """Within 2 %: a rollout's forward, and a training step's forward and backward. Of one row."""
    full = Full(kind, rows=1)
    full.fuse()
    forward, backward = least_flops(kind)
    with full.mode:
        with torch.no_grad(), CountFlops() as drawn:
            full.forward()
        with CountFlops() as trained_forward:
            out = full.forward()
        with CountFlops() as trained_backward:
            out.backward(torch.empty_like(out))
    print(f"\n{kind}: forward {drawn.total / 1e12:.3f} TFLOP ({forward / 1e12:.3f} least), ", end="")
    print(f"backward {trained_backward.total / 1e12:.3f} ({backward / 1e12:.3f})")
    assert drawn.total == trained_forward.total == pytest.approx(forward, rel=0.02)
    assert trained_backward.total == pytest.approx(backward, rel=0.02)


SAVED = {  # GiB a row that wait for the backward
    "sd3": {"diffusers": 6.94, "fast, PyTorch's ops": 6.03, "fast": 4.83, "balanced": 3.96, "small": 0.32},
    "flux": {"diffusers": 24.25, "fast, PyTorch's ops": 24.24, "fast": 21.19, "balanced": 14.7, "small": 1.53},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FULL)
def test_saved_bytes_of_a_row(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's ops as a CPU has them, which composes an RMS norm of many."""
    full, found = Full(kind, rows=1), {}
    for mode in SAVED[kind]:
        if mode.startswith("fast,"):
            full.fuse()
        if mode == "fast":
            use_triton(monkeypatch)
        if mode in ("balanced", "small"):
            fuse(full.network, recompute=mode == "balanced")
        if mode == "small":
            full.network.enable_gradient_checkpointing()
        with full.mode, LiveStorage() as live:
            held = live.count([*full.network.parameters(), *full.network.buffers()])
            out = full.forward()
            found[mode] = (live.current_bytes - held - out.nbytes) / 2**30
    print("\n", kind, {mode: round(saved, 2) for mode, saved in found.items()})
    assert found == pytest.approx(SAVED[kind], abs=0.01)
