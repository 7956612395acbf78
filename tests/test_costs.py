"""Counted costs against measured ones: whole iterations of real networks, published numbers, sums made by hand."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from runs import built
from safetensors.torch import load_file
from tiny import make_tiny_sd15, make_tiny_sdxl
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from spo_fast import train
from spo_fast.config.presets import PRESETS
from spo_fast.config.training import Config
from spo_fast.evaluation.required_files import resolve, scorer_paths
from spo_fast.models.device import Device
from spo_fast.models.files.clip_tokenizer import END, clip_tokenizer
from spo_fast.models.files.load import load_text_encoders, load_unet
from spo_fast.scorers.latent_files import init_latent_reward, save_latent_reward
from spo_fast.scorers.spm import ClipScorer, make_tiny_spm
from spo_fast.toy.build import write_pairs
from spo_fast.training import batches
from spo_fast.training.loop import Run
from spo_fast.training.pair_batches import READ_BATCH
from spo_fast.training.plan import costs, counters, fake_run
from spo_fast.training.plan.costs import Costs
from spo_fast.training.plan.counters import CountFlops, LiveStorage
from spo_fast.training.plan.fake_run import predict
from spo_fast.training.plan.fit_memory import choose
from spo_fast.training.plan.once import Once

# the toy at its own size, its batches smaller than the preset's
TOY: dict[str, Any] = {
    "sample_batch_size": 8,
    "max_prompts": 16,
    "num_candidates": 3,
    "decode_chunk": 16,
    "train_batch_size": 8,
    "resolution": 16,
}

# ------------------------------------------------------------------------------------------------- a real iteration


@dataclass(frozen=True)
class Measured:
    cfg: Config
    resident: int
    transient: dict[str, int]  # phase -> bytes
    rows: int  # through the UNet without gradient
    images: int  # decoded

    @property
    def peak(self) -> int:
        return self.resident + max(self.transient.values())


def weights(run: Run) -> list[torch.Tensor]:
    """What the run holds before its first step: each tensor once."""
    scorers: list[ClipScorer] = list(getattr(run.scorer, "scorers", [run.scorer]))
    networks: list[Any] = [run.model.network, run.model.vae, *(s.model for s in scorers), run.policy._frozen_copy]
    found = [t for n in networks if n is not None for t in (*n.parameters(), *n.buffers())]
    averages = [t for average in run.policy.kept.values() for t in average.tensors]
    return list({id(t): t for t in [*found, *run.policy.masters, *(run.policy._start or ()), *averages]}.values())


def moments(run: Run) -> int:
    """Bytes of the optimizer's tensors, those that its states share counted once."""
    tensors = [t for s in run.learner.optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def measure(output_dir: Path, **settings: Any) -> Measured:
    """The second of two iterations (the optimizer has its state then), every pair kept: threshold -1."""
    run = built(output_dir, **{**TOY, **settings})
    batches.encode_first(run)
    rows, images = [], []
    run.model.network.register_forward_pre_hook(
        lambda _, args: rows.append(0 if torch.is_grad_enabled() else len(args[0]))
    )
    decode = run.decode
    run.decode = lambda x: images.append(len(x)) or decode(x)  # type: ignore[method-assign, func-returns-value]
    with LiveStorage() as live:
        held = live.count(weights(run))
        run.iterate(1, live.phase)  # type: ignore[arg-type]  # a timer
        live.peaks.clear()
        del rows[:], images[:]
        run.iterate(0, live.phase)  # type: ignore[arg-type]
    held += moments(run)
    transient = {phase: peak - held for phase, peak in live.peaks.items() if phase}
    return Measured(run.cfg, held, transient, sum(rows), sum(images))


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True},
    "fused": {"fuse": True},
    "balanced": {"fuse": True, "memory": "balanced"},
    "no guidance": {"guidance_scale": 1.0},
    "bf16": {"mixed_precision": "bf16", "scorer_dtype": "bf16"},
    "inner steps": {"num_inner_steps": 1},
    "small pieces": {"states_per_forward": 3, "rows_per_forward": 4, "decode_chunk": 2, "num_inner_steps": 1},
    "8-bit, two scorers": {
        "optimizer": "adamw8bit",
        "min_8bit_size": 1024,
        "scorer": ("spm:1", "pickscore:0.5"),
        "train_batch_size": 4,
    },
    "full": {"full_finetune": True, "mixed_precision": "bf16"},
    "nf4": {"base_weights": "nf4", "mixed_precision": "bf16"},
    "int8": {"base_weights": "int8", "fuse": True},
    "fp8": {"base_weights": "fp8", "mixed_precision": "bf16", "fuse": True},
    "an exported average": {"ema_decay": 0.99},
    "DoRA": {"use_dora": True},
    "prodigy": {"optimizer": "prodigy"},
    "schedulefree": {"optimizer": "schedulefree"},
    "half the batch": {"sample_batch_size": 4, "train_batch_size": 4},
}


SLOW = ("inner steps", "8-bit, two scorers", "full")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Measured, Costs]]:
    """What an iteration with these SETTINGS took, and its prediction; each made once."""

    @functools.cache
    def of(name: str) -> tuple[Measured, Costs]:
        real = measure(tmp_path_factory.mktemp("run") / "run", **SETTINGS[name])
        return real, predict(real.cfg, device_type="cpu")

    return of


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in SETTINGS])
def test_predicted_memory_is_what_an_iteration_takes(name, both):
    """The requirement is 15 %; the tracker sees the same operations in both, so a miss of 5 % is a fault."""
    if name in ("prodigy", "schedulefree"):
        pytest.importorskip({"prodigy": "prodigyopt"}.get(name, name))
    real, counted = both(name)
    assert sum(counted.resident.values()) == pytest.approx(real.resident, rel=0.01)
    assert set(real.transient) == set(counted.transient) - {"encode prompts"}
    for phase, taken in real.transient.items():
        assert counted.transient[phase] == pytest.approx(taken, rel=0.05), phase
    assert counted.peak == pytest.approx(real.peak, rel=0.05)
    # the reference of a full fine-tuning is another module
    reference = 0 if real.cfg.adapter.full_finetune else counted.samples["reference"]
    assert real.rows == counted.samples["rollout"] + reference
    assert real.images == counted.samples["decode"]
    assert counted.samples["score"] == real.images * len(real.cfg.scorer.scorer)


def test_settings_move_the_measured_and_the_predicted_peaks_alike(both):
    for name, phase, low, high in (
        ("checkpointing", "backward", 0.2, 0.5),
        ("no guidance", "backward", 0.4, 0.6),
        ("no guidance", "rollout", 0.4, 0.6),
        ("half the batch", "backward", 0.4, 0.6),
        ("half the batch", "rollout", 0.4, 0.6),
        ("small pieces", "rollout", 0.05, 0.3),
        ("bf16", "backward", 0.4, 0.6),
    ):
        real, counted = (
            a.transient[phase] / b.transient[phase] for a, b in zip(both(name), both("plain"), strict=True)
        )
        assert low < real < high and counted == pytest.approx(real, rel=0.05), (name, phase)


def test_a_lora_to_start_from_is_held_and_copied(tmp_path):
    """The reference is that LoRA: kept beside the trained one, and changed places with it through a third copy."""
    first = built(tmp_path / "first", **TOY)
    first.export(tmp_path / "first")
    real = measure(tmp_path / "run", lora_path=tmp_path / "first")
    counted = predict(real.cfg, device_type="cpu")
    assert counted.resident["reference copy"] == counted.resident["LoRA"]
    for phase, taken in real.transient.items():
        assert counted.transient[phase] == pytest.approx(taken, rel=0.05), phase


def test_gradients_that_straddle_rollouts_are_counted(tmp_path):
    """3 slots of 8 pairs an iteration, a step every 2: one iteration in two begins with gradients."""
    settings = {"accumulation": "published", "gradient_accumulation_steps": 2, "sample_batch_size": 12}
    real = measure(tmp_path / "run", **settings, max_prompts=24)
    predicted = predict(real.cfg, device_type="cpu")
    for phase, taken in real.transient.items():
        assert predicted.transient[phase] == pytest.approx(taken, rel=0.05), phase
    assert predicted.gradients > 0.1 * real.transient["score"]  # they would be missed


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_other_directories_bring_their_own_sizes(kind, fuse, tmp_path):
    """Tiny pipelines with a VAE that enlarges, a SPM in a file of its own: read from their configs and headers."""
    make = {"sd15": make_tiny_sd15, "sdxl": make_tiny_sdxl}[kind]
    spm = make_tiny_spm(tmp_path / "spm", vocab_size=len(clip_tokenizer(END, 16, merges=())), max_length=16)
    own = {"model": kind, "pretrained_model_name_or_path": make(tmp_path / kind), "resolution": 64}
    own["spm_path"] = spm / "model.safetensors"
    if kind == "sd15":  # the published form
        own["spm_path"] = spm / "spm.bin"
        torch.save(load_file(spm / "model.safetensors"), own["spm_path"])
    real = measure(tmp_path / "run", **own, sample_batch_size=2, train_batch_size=4, fuse=fuse)
    predicted = predict(real.cfg, resolve(real.cfg.model, scorer_paths(real.cfg.scorer)), "cpu")
    assert sum(predicted.resident.values()) == pytest.approx(real.resident, rel=0.01)
    for phase, taken in real.transient.items():
        assert predicted.transient[phase] == pytest.approx(taken, rel=0.1), phase


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["plain", "checkpointing", "full"])
def test_predicted_memory_is_what_the_gpu_allocates(name, tmp_path):
    settings = {**SETTINGS[name], "mixed_precision": "fp16", "sample_batch_size": 16, "train_batch_size": 32}
    run = built(tmp_path / "run", **{**TOY, **settings, "max_prompts": 32, "device": "cuda"})
    batches.encode_first(run)
    with LiveStorage(counters.CUDA_BLOCK) as live:
        live.count(weights(run))
        run.iterate(1, live.phase)  # type: ignore[arg-type]
        torch.cuda.synchronize()
        # what libraries keep for themselves: workspaces of cuBLAS and the like
        libraries = torch.cuda.memory_allocated() - live.current_bytes
    torch.cuda.reset_peak_memory_stats()
    run.iterate(0, LiveStorage().phase)  # type: ignore[arg-type]  # not entered: a timer that does nothing
    real = torch.cuda.max_memory_allocated() - libraries
    assert predict(run.cfg, device_type="cuda").peak == pytest.approx(real, rel=0.15)


# ------------------------------------------------------------------------------------------------- published numbers

TERA = 1e12
# TFLOP of an iteration at equal maths when nothing is computed twice, with every pair kept and with half of them; the
# published loop executes 3923 and 2533, 4552 and 3726
LEAST = {"sdxl": (3524, 2318), "sd15": (3651, 3244)}


def assert_near_the_least(kind: str, c: Costs) -> None:
    for share, least in zip((1.0, 0.5), LEAST[kind], strict=True):
        assert 0.98 * least < sum(c.flops(share).values()) / TERA <= 1.02 * least


@pytest.mark.slow
def test_sdxl_costs_what_was_published():
    """Counted on meta tensors by other means. 140 and 16 are the published run's calls."""
    cfg = PRESETS["sdxl"]().with_fields(fuse=False)
    c = predict(cfg)
    assert_near_the_least("sdxl", c)
    merged = predict(cfg.with_fields(rollout_weights="merged"))
    assert merged.full_flops["rollout"] / merged.samples["rollout"] / TERA == pytest.approx(6.761, rel=0.01)
    assert merged.resident["merged weights"] / 2**30 == pytest.approx(1.8, rel=0.02)
    assert (c.samples["rollout"], c.samples["decode"], c.samples["score"]) == (140, 16, 16)
    assert c.samples["reference"] == c.samples["policy"] == 2 * 56  # 8 pairs share x_t, 24 do not
    each = {part: n / c.samples[part] / TERA for part, n in c.full_flops.items()}
    assert each["rollout"] == pytest.approx(6.927, rel=0.01)
    assert each["reference"] == pytest.approx(6.761, rel=0.01)
    assert each["policy"] - each["rollout"] == pytest.approx(8.023, rel=0.01)
    assert each["decode"] == pytest.approx(10.47, rel=0.01)
    assert each["score"] == pytest.approx(0.335, rel=0.01)
    assert c.flops_per_prompt / TERA == pytest.approx(0.013 + 0.098 + 0.047, rel=0.02)
    gib = {part: n / 2**30 for part, n in c.resident.items()}
    assert gib["UNet"] == pytest.approx(2_567_463_684 * 2 / 2**30, rel=1e-3)
    assert gib["LoRA"] + gib["float32 masters"] + gib["optimizer state"] == pytest.approx(
        92_897_280 * (2 + 4 + 8) / 2**30, rel=1e-3
    )
    assert gib["scorer spm"] == pytest.approx(1.3062e9 * 4 / 2**30, rel=1e-3)
    # 5.1 GiB of saved activations a row, 1.5 GiB a decoded image
    assert c.transient["backward"] / 8 / 2**30 == pytest.approx(5.3, rel=0.05)
    assert c.transient["score"] / 4 / 2**30 == pytest.approx(1.5, rel=0.05)
    small = predict(cfg.with_fields(rows_per_forward=2, states_per_forward=2, decode_chunk=1))
    assert {p for p in costs.PHASES if small.transient[p] < 0.6 * c.transient[p]} == {
        "rollout",
        "score",
        "backward",
        "reference",
    }


@pytest.mark.slow
def test_sdxl_fits_by_memory_mode():
    """As many states as published; the goals are 50 GiB fast and 14 GiB small, here without what CUDA graphs keep."""
    plain = ["--model", "sdxl", "--no-cuda_graphs", "--memory"]
    parsed = {m: train.parse([*plain, m]) for m in ("fast", "balanced", "small")}
    gib = {m: predict(choose(cfg, Device("a GPU", "cuda", 141 * 10**9))[0]).peak / 2**30 for m, cfg in parsed.items()}
    assert gib["fast"] <= 50 and gib["small"] <= 14
    assert gib["balanced"] == pytest.approx(43.4, abs=0.3)


@pytest.mark.slow
def test_text_is_projected_once_a_rollout():
    """SDXL: 0.8 % of a forward, at every step as published; here for each of the rollout's two batches of prompts."""
    cfg = PRESETS["sdxl"]()
    plain, fused = (predict(cfg.with_fields(fuse=on)).full_flops for on in (False, True))
    for part in ("policy", "reference"):  # but for the time embedding, which is a table
        assert fused[part] == pytest.approx(plain[part], rel=1e-6)
    assert 0.990 < fused["rollout"] / plain["rollout"] < 0.994


@pytest.mark.slow
def test_sd15_costs_what_was_published():
    c = predict(PRESETS["sd15"]().with_fields(fuse=False))
    assert_near_the_least("sd15", c)
    assert (c.samples["rollout"], c.samples["decode"], c.samples["score"]) == (1300, 640, 640)
    assert c.samples["reference"] == 2 * 160
    each = {part: n / c.samples[part] / TERA for part, n in c.full_flops.items()}
    assert each["reference"] == pytest.approx(0.803, rel=0.01)
    assert each["policy"] - each["rollout"] == pytest.approx(0.973, rel=0.01)
    assert each["decode"] == pytest.approx(2.51, rel=0.01)
    half = c.flops(valid_share=0.5)
    assert half["rollout"] == c.full_flops["rollout"] and half["policy"] == c.full_flops["policy"] / 2


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tera"), [("sd15", 0.141), ("sdxl", 0.565)])
def test_the_tiny_vae_costs_what_was_published(kind, tera):
    vae = {"sd15": "madebyollin/taesd", "sdxl": "madebyollin/taesdxl"}[kind]
    cfg = PRESETS[kind]().with_fields(pretrained_vae_model_name_or_path=vae, sample_batch_size=1, num_steps=6, rank=1)
    c = predict(cfg)
    assert c.full_flops["decode"] / c.samples["decode"] / TERA == pytest.approx(tera, rel=0.01)


# ------------------------------------------------------------------------------------------------- proportion


def test_flops_and_memory_grow_in_proportion_to_the_rows():
    cfg = PRESETS["toy"]().with_fields(num_candidates=3, num_steps=6, decode_chunk=1000)
    at = {n: predict(cfg.with_fields(sample_batch_size=n, train_batch_size=n), device_type="cpu") for n in (4, 8, 12)}
    for part in at[4].samples:
        # a step-aware scorer computes its timestep's modulation once a call, whatever the images: a little less
        assert at[12].full_flops[part] == pytest.approx(3 * at[4].full_flops[part], rel=0.01 if part == "score" else 0)
    for phase in ("rollout", "reference", "backward"):
        one, two, three = (at[n].transient[phase] for n in (4, 8, 12))
        assert three - two == pytest.approx(two - one, rel=0.01) and two > 1.8 * one


# ------------------------------------------------------------------------------------------------- the trackers


def test_live_storage_counts_what_is_alive():
    before = torch.zeros(1000)
    with LiveStorage() as live:
        assert live.count([before, before]) == 4000
        a = torch.zeros(250)  # 1000 bytes
        view = a[:10].view(2, 5)
        before.t().add_(1)  # a view of what was there already
        assert live.current_bytes == 5000
        with live.phase("inner"):
            b = a.double() + 1  # 2000 and 2000 bytes, the first gone again
            assert live.peaks["inner"] == 9000 and live.current_bytes == 7000
        del a
        assert live.current_bytes == 7000  # view holds it
        del view, b
        assert live.current_bytes == 4000
    assert live.peaks == {"": 5000, "inner": 9000} and live.peak_bytes == 9000
    with LiveStorage(block=512) as live:
        x = torch.zeros(1)
        assert live.current_bytes == 512 and x is not None


def test_live_storage_sees_what_a_backward_holds():
    layer = nn.Linear(100, 100, bias=False)
    with LiveStorage() as live:
        x = torch.zeros(10, 100)
        y = layer(x).relu().sum()
        assert live.current_bytes == 4000 + 4000 + 4  # x, and relu's result, which the graph holds
        y.backward()
        assert live.current_bytes == 4000 + 4 + 40_000  # the graph is gone, the weight has a gradient
        # at the end: x, relu's gradient, the weight's, the sum and its gradient
        assert live.peak_bytes == 4000 + 4000 + 40_000 + 4 + 4


@pytest.mark.parametrize("fake", [False, True])
def test_attention_is_not_materialised(fake):
    """4096 x 4096 weights would take 64 MiB; queries, keys, values and the result are 1 MiB each."""
    with FakeTensorMode() if fake else torch.no_grad(), LiveStorage() as live, CountFlops() as flops:
        q, k, v = (torch.zeros(1, 1, 4096, 64) for _ in range(3))
        out = F.scaled_dot_product_attention(q, k, v)
    assert out.shape == q.shape and live.peak_bytes < 5 << 20
    assert flops.total == 2 * (2 * 4096 * 4096 * 64)


def test_flops_are_twice_the_products():
    with FakeTensorMode(), CountFlops() as flops:
        x = torch.zeros(3, 5, 8, 8, requires_grad=True)
        y = F.conv2d(x, torch.zeros(7, 5, 3, 3), padding=1)
        conv = 2 * 3 * 7 * 64 * 5 * 9
        assert flops.total == conv
        z = F.linear(y.flatten(1), torch.zeros(2, 448))
        linear = 2 * 3 * 448 * 2
        assert flops.total == conv + linear
        z.sum().backward()  # frozen weights: one product each, for the inputs
        assert flops.total == 2 * (conv + linear)


def test_a_product_added_in_place_is_counted_and_remembered():
    """PyTorch remembers the fake outcome of no operator with out=, which would take a third of a count's time."""
    once = Once()
    y, x, weight = (once.empty(*shape, dtype=torch.float32) for shape in ((3, 7), (3, 5), (5, 7)))
    refused = Counter(FakeTensorMode.cache_info().bypasses)
    with once.live:
        assert torch.addmm(y, x, weight, beta=0.5, out=y) is y
        other = torch.addmm(y, x, weight, out=once.empty(3, 7, dtype=torch.float32))  # into another: as it is
    assert other is not y and once.live.flops == 2 * (2 * 3 * 5 * 7)
    assert (Counter(FakeTensorMode.cache_info().bypasses) - refused)["kwarg aliases output"] == 1


# ------------------------------------------------------------------------------------------------- what is kept


def test_what_was_counted_before_changes_nothing(tmp_path):
    """Predictions of one model share their networks: in whatever order, each is what it is alone."""
    small = {"sample_batch_size": 2, "train_batch_size": 2, "num_steps": 6}
    plain = PRESETS["toy"]().with_fields(**small)
    others = [plain.with_fields(gradient_checkpointing=True), plain.with_fields(guidance_scale=1.0, decode_chunk=1)]
    mixed = [predict(cfg, device_type="cpu") for cfg in (plain, *others, plain)]
    assert mixed[0] == mixed[-1] and mixed[0] != mixed[1] != mixed[2]
    for cfg, before in zip(others, mixed[1:], strict=False):
        fake_run.LATEST.clear()
        assert predict(cfg, device_type="cpu") == before


def test_auto_precision_is_the_devices():
    cfg = PRESETS["toy"]().with_fields(mixed_precision="auto", sample_batch_size=2, train_batch_size=2)
    cpu, cuda = (predict(cfg, device_type=device) for device in ("cpu", "cuda"))
    assert "float32 masters" in cuda.resident and "float32 masters" not in cpu.resident
    assert cuda.transient["backward"] < 0.7 * cpu.transient["backward"]


def test_sharded_masters_and_moments_are_the_largest_part(monkeypatch):
    """Full fine-tuning on 4 processes, by hand; everything else but the step stays as it is on one."""
    cfg = PRESETS["toy"]().with_fields(full_finetune=True, sample_batch_size=2, train_batch_size=2, optimizer="adamw")
    one = predict(cfg, device_type="cpu")
    monkeypatch.setenv("WORLD_SIZE", "4")
    four = predict(cfg, device_type="cpu")
    unet = load_unet(resolve(cfg.model, scorer_paths(cfg.scorer)), torch.float32)
    part = 4 * sum(math.ceil(p.shape[0] / 4) * p[0].numel() for p in unet.parameters())
    assert "float32 masters" not in one.resident and four.resident["float32 masters"] == part
    assert four.resident["optimizer state"] == 2 * part < 0.26 * one.resident["optimizer state"]
    fewer = ("float32 masters", "optimizer state")
    assert all(four.resident[n] == size for n, size in one.resident.items() if n not in fewer)
    assert {p for p in one.transient if one.transient[p] != four.transient[p]} == {"step"}
    lora = cfg.with_fields(full_finetune=False)
    there = predict(lora, device_type="cpu")
    monkeypatch.delenv("WORLD_SIZE")
    assert predict(lora, device_type="cpu") == there


# ------------------------------------------------------------------------------------------------- other methods

METHODS: dict[str, dict[str, Any]] = {
    "d3po": {"method": "d3po", "num_candidates": None, "num_steps": 8},
    "gradspo": {"method": "gradspo", "num_steps": 8},
    "dpok": {"method": "dpok", "num_steps": 4, "train_batch_size": 16, "threshold": None},
    "dense": {"method": "dense", "terms_per_prompt": 2, "threshold": None},
    "dpo": {"method": "dpo", "num_candidates": None, "threshold": None, "branch_start": None},
    "mapo": {"method": "mapo", "num_candidates": None, "threshold": None, "branch_start": None},
    "lpo": {"method": "lpo", "num_steps": 8},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_other_methods_cost_what_is_predicted(name, tmp_path):
    """UNet rows, images and scores to the number; memory within 10 %: terms that share states by chance need less."""
    settings = {**METHODS[name]}
    if name in ("dpo", "mapo"):
        write_pairs(tmp_path / "pairs.parquet", 40, seed=0)
        settings |= {"pairs": tmp_path / "pairs.parquet", "validation_share": 0.1, "cache_latents": False}
    if name == "lpo":
        resolved = resolve(built(tmp_path / "x").cfg.model, {})
        parts = load_unet(resolved, torch.float32), load_text_encoders(resolved, torch.float32)
        save_latent_reward(init_latent_reward(*parts, seed=0), tmp_path / "lrm")
        settings |= {"lrm_path": tmp_path / "lrm"}
    real = measure(tmp_path / "run", **settings)
    counted = predict(real.cfg, device_type="cpu")
    # `measure` does not look for the text encoders, which stay where prompts come with pairs
    late = counted.resident.get("text encoders", 0)
    assert sum(counted.resident.values()) == pytest.approx(real.resident + late, rel=0.02)
    assert set(real.transient) == set(counted.transient) - {"encode prompts"}
    if name != "dense":
        rollout, reference = (counted.samples.get(part, 0) for part in ("rollout", "reference"))
        assert real.rows == rollout + reference
    assert real.images == counted.samples.get("decode", 0)
    for phase, taken in real.transient.items():
        predicted = counted.transient[phase]
        if name in ("dpo", "mapo") and phase != "backward":
            # what reading a batch of pairs needs on its way is not counted: some copies of its latents
            assert 0 <= taken - predicted < 5 * 2 * READ_BATCH * 3 * 16 * 16 * 4, phase
        elif name == "dense":
            assert 0.9 * taken < predicted < 2 * taken, phase
        else:
            assert predicted == pytest.approx(taken, rel=0.1), phase
