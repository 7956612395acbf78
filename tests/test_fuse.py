"""models/fuse.py: operations of an SDXL forward counted, and equality with diffusers' own forwards in float64."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.upsampling import Upsample2D
from peft import LoraConfig, get_peft_model
from runs import facts, run_toy
from safetensors.torch import load_file
from tiny import make_tiny_sd15, make_tiny_sdxl, tiny_vae
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from spo_fast.config.presets import PRESETS
from spo_fast.config.training import AdapterConfig
from spo_fast.data.files import read_json
from spo_fast.method.experience import Cond
from spo_fast.models.diffusion import decode, decode_in_cache
from spo_fast.models.files.sources import CONFIGS
from spo_fast.models.files.toy import toy_files
from spo_fast.models.fuse import FusedResnet, FusedUpsample, fuse
from spo_fast.models.policy import Policy
from spo_fast.ops import backend
from spo_fast.training.plan.counters import LiveStorage


class CountOps(TorchDispatchMode):
    """Operations that compute or move data: no views, no empty tensors, no questions about a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func._schema.name.split("::")
        aliases = [r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns]
        free = any(aliases) or name in ("_unsafe_view", "split_with_sizes") or name.startswith(("empty", "new_empty"))
        if namespace in ("aten", "spo_fast") and not free:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def fake_sdxl(lora: bool) -> tuple[FakeTensorMode, Policy]:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(read_json(CONFIGS / "sdxl" / "unet" / "config.json"))
        policy = Policy(unet, PRESETS["sdxl"]().adapter, seed=0)
    mode = FakeTensorMode()
    with mode:
        for part in unet.modules():
            for name, p in part.named_parameters(recurse=False):
                part._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=torch.float16), p.requires_grad)
    if not lora:
        unet.disable_adapters()
    return mode, policy


def sdxl_cond(num_prompts: int, dtype: torch.dtype) -> Cond:
    def halves(n: int) -> dict[str, torch.Tensor]:
        shapes = {"prompt_embeds": (77, 2048), "text_embeds": (1280,), "time_ids": (6,)}
        return {name: torch.zeros(n, *shape, dtype=dtype) for name, shape in shapes.items()}

    return Cond(halves(num_prompts), halves(1))


def forward_ops(lora: bool, fused: bool) -> Counter[str]:
    """Of the second guided forward of an SDXL rollout: 4 candidates, 8 rows, 1024 pixels."""
    mode, policy = fake_sdxl(lora)
    with mode, torch.no_grad():
        if fused:
            policy.fuse()
        told = policy.precompute_text(sdxl_cond(4, torch.float16), guided=True)
        inputs = torch.empty(4, 4, 128, 128), torch.zeros((), dtype=torch.int64)
        policy.predict(*inputs, told, guided=True)
        with CountOps() as ops:
            policy.predict(*inputs, told, guided=True)
    return ops.seen


@pytest.mark.slow
def test_a_rollouts_forward_has_few_operations(monkeypatch):
    """Counted as a GPU runs them, that is with Triton's ops, whose fake forms need no GPU."""
    plain = {lora: forward_ops(lora, fused=False) for lora in (False, True)}
    composed = {lora: forward_ops(lora, fused=True) for lora in (False, True)}
    monkeypatch.setattr(backend, "choose", lambda name, like: "triton")
    kernels = {lora: forward_ops(lora, fused=True) for lora in (False, True)}
    print("\nSDXL forward, operations:        LoRA off   LoRA on")
    for name, counts in (("diffusers", plain), ("fused, PyTorch's ops", composed), ("fused, Triton's ops", kernels)):
        print(f"{name:32} {sum(counts[False].values()):8,} {sum(counts[True].values()):9,}")
    assert sum(plain[False].values()) == 1860 and sum(plain[True].values()) == 4100
    assert sum(kernels[False].values()) <= 1400 and sum(composed[False].values()) <= 1600
    # a LoRA layer is two launches, its own part and the base's product that goes on from there; so are three that
    # share x; text keys and values are not among them
    assert kernels[True]["lora_down_up_triton"] == 210 and kernels[True]["lora_down_up_three_triton"] == 70
    assert sum(kernels[True].values()) == sum(kernels[False].values()) + 210 - 70 <= 1600
    assert sum(composed[True].values()) < 2400
    for counts in (composed, kernels):
        assert all(c["div"] == 0 and c["_to_copy"] == 1 for c in counts.values())  # the latents, once


# ------------------------------------------------------------------------------------------------- equality

KINDS = {"toy": lambda path: toy_files()["model"], "sd15": make_tiny_sd15, "sdxl": make_tiny_sdxl}
VARIANTS = {
    "attention": AdapterConfig(rank=3, lora_alpha=2.0),
    "convolutions": AdapterConfig(rank=3, lora_targets=("to_q", "to_v", "to_out.0", "conv1", "conv2")),
    "everywhere": AdapterConfig(rank=2, lora_targets=("to_k", "proj", "linear_1", "time_emb_proj", "conv_shortcut")),
    "full": AdapterConfig(full_finetune=True),
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict[str, Any]:
    return {kind: make(tmp_path_factory.mktemp(kind)) for kind, make in KINDS.items()}


def make_policy(directory: Any, variant: str, dtype: torch.dtype, like: torch.dtype | None = None) -> Policy:
    """like: the values are those that this type can hold. LoRA B's, which start at zero, are filled."""
    from diffusers import UNet2DConditionModel

    unet: Any = UNet2DConditionModel.from_pretrained(directory / "unet")
    for tensor in (*unet.parameters(), *unet.buffers()):
        tensor.data = tensor.data.to(like or dtype).to(dtype)
    policy = Policy(unet, VARIANTS[variant], seed=0)
    generator = torch.Generator().manual_seed(1)
    state = policy.state_dict()
    for name, value in state.items():
        if "lora_" in name:
            drawn = torch.randn(value.shape, generator=generator) * (0.1 if "lora_B" in name else 0.3)
            state[name] = drawn.to(like or dtype).to(value.dtype)
    policy.load_state_dict(state)
    return policy


def make_inputs(policy: Policy) -> tuple[torch.Tensor, torch.Tensor, Cond]:
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().to(policy.dtype)  # every type holds the values

    config, shapes = policy.network.config, {}
    shapes["prompt_embeds"] = (7, config.cross_attention_dim)
    if config.addition_embed_type == "text_time":
        shapes["text_embeds"] = (config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim,)
        shapes["time_ids"] = (6,)
    cond = Cond(*({name: draw(n, *shape) for name, shape in shapes.items()} for n in (3, 1)))
    return draw(3, config.in_channels, 8, 8), torch.tensor([951, 401, 1]), cond


def results(policy: Policy) -> dict[str, torch.Tensor]:
    """Outputs without gradient (policy twice: the second time from kept keys; reference), and with; gradients."""
    x_t, t, cond = make_inputs(policy)
    found = {}
    with torch.no_grad():
        for name in ("first", "again"):
            found[name] = torch.cat(policy.predict(x_t, t, cond, guided=True))
        found["unguided"] = policy.predict(x_t, t[1], cond, guided=False).cond
        with policy.reference():
            found["reference"] = torch.cat(policy.predict(x_t, t, cond, guided=True))
        found["after"] = torch.cat(policy.predict(x_t, t, cond, guided=True))
    x_t.requires_grad_()
    m = torch.cat(policy.predict(x_t, t, cond, guided=True))
    m.backward(torch.randn(m.shape, generator=torch.Generator().manual_seed(3)).to(m.dtype))
    found |= {"trained": m.detach(), "x_t": x_t.grad}
    for name, master in zip(policy.names, policy.masters, strict=True):
        if master.grad is not None:
            found[name] = master.grad
    return {name: value.double() for name, value in found.items()}


def errors(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> dict[str, float]:
    """Of each part, of its size (root mean squares); all weights' gradients are one part."""
    assert got.keys() == want.keys()
    parts: dict[str, list[torch.Tensor]] = {}
    for name, value in got.items():
        pair = torch.stack([value - want[name], want[name]]).flatten(1)
        parts.setdefault("weights" if "." in name else name, []).append(pair)
    sizes = {part: torch.cat(pairs, 1).norm(dim=1).tolist() for part, pairs in parts.items()}
    return {part: error / size for part, (error, size) in sizes.items()}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_fused_equals_plain_in_float64(kind, variant, recompute, directories):
    plain = make_policy(directories[kind], variant, torch.float64)
    fused = make_policy(directories[kind], variant, torch.float64)
    fused.fuse(recompute)
    found = errors(results(fused), results(plain))
    assert max(found.values()) < 1e-10, found


PATTERNS = [{"rank_pattern": {"to_k": 7}}, {"alpha_pattern": {"to_v": 9}}, {"alpha_pattern": {"attn2.to_v": 9}}]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("grad", [False, True])
def test_each_layer_has_the_rank_and_alpha_of_its_own(pattern, grad, directories):
    """As LoRA files of other trainers may have."""
    from diffusers import UNet2DConditionModel

    def make() -> Any:
        unet: Any = UNet2DConditionModel.from_pretrained(directories["sdxl"] / "unet").double()
        unet.requires_grad_(False)
        torch.manual_seed(0)
        targets = ["to_q", "to_k", "to_v"]
        config = LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False, **pattern)
        unet.add_adapter(config)
        return unet.double()

    plain, fused = make(), make()
    fuse(fused)
    policy = make_policy(directories["sdxl"], "attention", torch.float64)
    x_t, t, cond = make_inputs(policy)
    prompt = {name: value for name, value in cond.cond.items() if name != "prompt_embeds"}
    with torch.set_grad_enabled(grad):
        got, want = (
            unet(x_t, t, cond.cond["prompt_embeds"], added_cond_kwargs=prompt).sample for unet in (fused, plain)
        )
        assert (got - want).norm() < 1e-10 * want.norm()
        if grad:
            for out in (got, want):
                out.square().sum().backward()
            wanted = dict(plain.named_parameters())
            for name, p in fused.named_parameters():
                if p.requires_grad:
                    want_grad = wanted[name].grad
                    assert (p.grad - want_grad).norm() <= 1e-10 * want_grad.norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["attention", "convolutions"])
@pytest.mark.parametrize("kind", KINDS)
def test_fused_errs_no_more_than_plain(kind, variant, dtype, directories):
    truth = results(make_policy(directories[kind], variant, torch.float64, like=dtype))
    plain = errors(results(make_policy(directories[kind], variant, dtype)), truth)
    policy = make_policy(directories[kind], variant, dtype)
    policy.fuse()
    fused = errors(results(policy), truth)
    for part, error in fused.items():
        assert error <= 2 * plain[part] + 1e-6, (part, error, plain[part])


def test_text_computed_once_serves_a_rollout(directories):
    """The same outputs with keys and values given as with them computed; they belong to the weights that made them."""
    policy = make_policy(directories["sdxl"], "attention", torch.float32)
    policy.fuse()
    x_t, t, cond = make_inputs(policy)

    @torch.no_grad()
    def outputs(cond: Cond) -> torch.Tensor:
        return torch.cat(policy.predict(x_t, t, cond, guided=True))

    told = policy.precompute_text(cond, guided=True)
    assert told.text is not None and torch.equal(outputs(told), outputs(cond))
    with torch.no_grad():
        for name, master in zip(policy.names, policy.masters, strict=True):
            master.mul_(3.0 if "attn2.to_k" in name else 1.0)
    policy.copy_to_network()
    assert not torch.allclose(outputs(policy.precompute_text(cond, guided=True)), outputs(told), atol=1e-3)
    assert torch.equal(outputs(policy.precompute_text(cond, guided=True)), outputs(cond))
    told, rows = (
        policy.precompute_text(cond, guided=True),
        torch.tensor([1, 0, 1]),
    )  # of other rows: theirs, both halves
    parts = (told.select(rows).text, policy.precompute_text(cond.select(rows), guided=True).text)
    got, want = ([v for v in pytree.tree_leaves(part) if isinstance(v, torch.Tensor)] for part in parts)
    assert len(got) == len(want) > 2 and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, want, strict=True))


def test_nothing_that_is_saved_changes(directories, tmp_path):
    """Names, values, configs and adapters of a fused UNet are those of a plain one."""
    plain, fused = (make_policy(directories["sdxl"], "convolutions", torch.float32) for _ in range(2))
    fused.fuse()
    assert plain.names == fused.names and plain.network.state_dict().keys() == fused.network.state_dict().keys()
    for name, value in plain.network.state_dict().items():
        assert torch.equal(value, fused.network.state_dict()[name]), name
    assert plain.network.config == fused.network.config and type(plain.network) is type(fused.network)
    assert plain.network.peft_config["default"].to_dict() == fused.network.peft_config["default"].to_dict()


@pytest.mark.parametrize("fused", [False, True])
def test_padding_changes_nothing(fused, directories):
    """A batch of 3 filled up to 5: rows that nobody asked for give no gradient."""
    plain, padded = (make_policy(directories["sdxl"], "convolutions", torch.float64) for _ in range(2))
    padded.batch_sizes = padded.state_sizes = (2, 5, 8)
    sizes = []
    padded.network.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    if fused:
        padded.fuse()
    found = errors(results(padded), results(plain))
    assert max(found.values()) < 1e-10 and set(sizes) == {5, 10}, found


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_nothing(kind, directories):
    plain, fused = (make_policy(directories[kind], "attention", torch.float64) for _ in range(2))
    fused.fuse()
    fused.network.enable_gradient_checkpointing()
    found = errors(results(fused), results(plain))
    assert max(found.values()) < 1e-10, found


@pytest.mark.parametrize("kind", KINDS)
def test_a_fused_vae_decodes_alike(kind, directories):
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL.from_pretrained(directories[kind] / "vae")
    vae.double().requires_grad_(False).eval()
    latents = make_inputs(make_policy(directories[kind], "attention", torch.float64))[0][:, :4]
    plain = decode(vae, latents)
    fuse(vae)
    fused = [m for m in vae.decoder.modules() if isinstance(m, FusedResnet)]
    assert len(fused) >= 3 and torch.allclose(decode(vae, latents), plain, rtol=0, atol=1e-10)


@pytest.mark.parametrize("sides", [(1, 1), (3, 5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_upsampling_and_its_convolution_are_one(dtype, sides):
    """Beside PyTorch's own two operations in float64, borders and gradient too; the sums are float32's or better."""
    up = Upsample2D(6, use_conv=True, out_channels=4, name="conv").to(dtype).requires_grad_(False)
    x = torch.randn(2, 6, *sides, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()

    def truth(size: tuple[int, ...]) -> torch.Tensor:
        weight, bias = up.conv.weight.double(), up.conv.bias.double()
        return F.conv2d(F.interpolate(x, size=size, mode="nearest"), weight, bias, padding=1)

    fuse(up)
    fuse(up)  # a second time changes nothing
    assert isinstance(up, FusedUpsample)
    twice, other = torch.Size(2 * side for side in sides), torch.Size(2 * side + 1 for side in sides)
    for size, wanted in ((None, twice), (twice, twice), (other, other)):
        got, want = up(x.to(dtype), size), truth(wanted)
        weights = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        gradients = [torch.autograd.grad((y * weights).sum(), x)[0] for y in (got, want)]
        loose = 1e-12 if dtype == torch.float64 else 2e-6
        assert (got - want).abs().max() < loose and (gradients[0] - gradients[1]).abs().max() < 10 * loose


@pytest.mark.parametrize("why", ["16 bits", "trained", "a LoRA", "a norm", "another size"])
def test_upsampling_that_is_left_alone(why):
    """Sums of weights must be exact, and stay true."""
    up: Any = Upsample2D(6, use_conv=True, name="conv", **({"norm_type": "ln_norm"} if why == "a norm" else {}))
    if why == "another size":
        up = Upsample2D(6, use_conv=True, name="conv", kernel_size=5, padding=2)
    up.requires_grad_(why == "trained").to(torch.bfloat16 if why == "16 bits" else torch.float32)
    if why == "a LoRA":
        up = get_peft_model(up, LoraConfig(r=2, target_modules=["conv"]))
    fuse(up)
    assert not any(isinstance(m, FusedUpsample) for m in up.modules())


SAVED = {  # GiB a row; counted by other means: 5.1 eager, 4.5 for a compiler's min cut, 0.43 to 0.50 checkpointed
    "plain": 5.28,
    "fast": 4.61,
    "balanced": 3.91,
    "small": 0.43,
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", SAVED)
def test_saved_bytes_of_an_sdxl_row(mode):
    fake, policy = fake_sdxl(lora=True)
    with fake:
        if mode != "plain":
            policy.fuse(recompute=mode == "balanced")
        if mode == "small":
            policy.network.enable_gradient_checkpointing()
        inputs = torch.empty(1, 4, 128, 128), torch.zeros((), dtype=torch.int64), sdxl_cond(1, torch.float16)
        with LiveStorage() as live:
            held = live.count(policy.network.parameters())
            m = policy.predict(*inputs, guided=True)
            saved = live.current_bytes - held - sum(half.nbytes for half in m if half is not None)
    print(f"\n{mode}: {saved / 2 / 2**30:.2f} GiB saved a row")
    assert saved / 2 / 2**30 == pytest.approx(SAVED[mode], abs=0.01)


RUNS: dict[str, dict[str, Any]] = {
    "lora": {},
    "balanced": {"memory": "balanced"},
    "small": {"memory": "small", "optimizer": "adamw"},
    "lora_path": {"lora_path": "start"},
    "full": {"full_finetune": True, "learning_rate": 1e-5},
    "16 bits": {"mixed_precision": "bf16"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_fused_run_learns_what_a_plain_one_does(name, tmp_path):
    """Two iterations, 4 optimizer steps, from rollout to the files that are written."""
    settings = {**RUNS[name], "max_train_steps": 2, "clip": "none", "learning_rate": 1e-4}
    if name == "lora_path":
        run_toy(tmp_path / "start", max_train_steps=1)
        settings["lora_path"] = tmp_path / "start"
    plain = run_toy(tmp_path / "plain", **{k: v for k, v in settings.items() if k != "memory"}, fuse=False)
    fused = run_toy(tmp_path / "fused", **settings, fuse=True)
    tolerance = 0.05 if name == "16 bits" else 1e-3
    for mine, theirs in zip(facts(fused), facts(plain), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=tolerance)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=10 * tolerance)
        assert mine["pairs"] == theirs["pairs"]
    if name == "full":
        file = Path("unet") / "diffusion_pytorch_model.safetensors"
    else:
        file = Path("pytorch_lora_weights.safetensors")
    ours, other = load_file(fused / file), load_file(plain / file)
    assert ours.keys() == other.keys() and all(ours[n].shape == other[n].shape for n in ours)
    # resumed: what was saved fits the fused network again
    run_toy(tmp_path / "fused", **{**settings, "max_train_steps": 3}, fuse=True, resume_from_checkpoint="latest")


def test_a_cpu_decodes_large_pictures_one_or_two_at_a_time(monkeypatch):
    """The same pictures as in one piece; small ones, and those of a GPU, stay together."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = tiny_vae(scaling_factor=0.18215).requires_grad_(False).eval()
    sizes, whole, exact = [], vae.decode, torch.zeros(())
    monkeypatch.setattr(vae, "decode", lambda x, **k: sizes.append(len(x)) or whole(x, **k))
    for side, dtype, asked in ((32, torch.float32, [1, 1, 1]), (32, torch.bfloat16, [2, 1]), (8, torch.float32, [3])):
        latents = torch.randn(3, 4, side, side, generator=torch.Generator().manual_seed(0))
        vae.to(dtype)
        sizes.clear()
        with torch.no_grad():
            found = decode_in_cache(vae, latents)
            assert sizes == asked
            want = decode(vae, latents)
        if dtype == torch.float32:
            exact = want if side == 32 else exact
            torch.testing.assert_close(found, want, atol=1e-4, rtol=0)
        else:  # no further apart than bf16's roundings, whose largest depends on the processor
            rounded = (want - exact).abs()
            assert (found - exact).abs().mean() < 1.1 * rounded.mean() < 0.01
            assert (found - want).abs().max() < 2 * rounded.max()
