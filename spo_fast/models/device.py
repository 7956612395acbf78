"""The device of a run, and choices made for it with their reasons."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from spo_fast.config.methods import find_method
from spo_fast.config.training import Config
from spo_fast.data.files import read_json
from spo_fast.models.files.layout import transformer_config
from spo_fast.models.files.sources import CONFIGS, Resolved
from spo_fast.models.files.toy import FLOW_WEIGHTS, WEIGHTS
from spo_fast.ops.onednn import measured_bf16_gain

GIB = 2**30
SHARE = 0.92  # of the device's memory: the rest is the allocator's fragments and the kernels' workspaces
CONTEXT = GIB // 2  # the CUDA context
FP8_CAPABILITY = (8, 9)  # Ada Lovelace, the first with such products
BF16_GAIN = 1.5  # of a CPU's products, from which on whole trainings are computed in bf16

PEAK_TFLOPS = {  # dense 16-bit tensor-core products with float32 accumulation, from the makers' data sheets
    "A100": 312, "A10": 125, "A40": 150, "L4": 121, "L40": 181, "L40S": 362, "RTX 3090": 71, "RTX 4090": 165,
    "RTX 5090": 210, "RTX A6000": 155, "RTX 6000 Ada": 364, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989,
    "H200 NVL": 835, "H200": 989, "B200": 2250,
}  # fmt: skip


def peak_tflops(name: str) -> float | None:
    """Of a card by the name its driver gives it; None if it is not in the table."""
    words = f" {name} ".replace("-", " ")
    known = [card for card in PEAK_TFLOPS if f" {card} " in words and " Laptop " not in words]
    return PEAK_TFLOPS[max(known, key=len)] if known else None


EAGER = 0.4
"""Share of the card's peak that networks reach without torch.compile: 125 of 312 TFLOP/s, SDXL on an A100 (published;
compiled 164). An estimate for every other card and model."""
COMPILED = 0.8
"""Compiled, networks take this share of the time: 125 / 164; 2.54 of 3.32 s, SDXL on an A100 (published)."""
COMPILE_S = 100
"""Seconds of compiling in a training's first iteration, on one core: 86 for SDXL, 90 for the toy (benchmarks/LOG.md)"""
DRAWING_S = 30
"""The same for an evaluation's pictures: of one batch size, and without a backward pass."""


@dataclass(frozen=True)
class Choice:
    """A setting that was chosen for the device, and why."""

    flag: str
    value: str | int | float | bool | None
    reason: str

    @property
    def words(self) -> str:
        """As it is written on the command line."""
        if isinstance(self.value, bool):
            return f"--{'' if self.value else 'no-'}{self.flag}"
        return f"--{self.flag} {self.value}"


def listed(choices: list[Choice]) -> str:
    """A line a reason."""
    reasons = dict.fromkeys(choice.reason for choice in choices)
    return "\n".join(f"{' '.join(c.words for c in choices if c.reason == reason)}: {reason}" for reason in reasons)


@dataclass(frozen=True)
class Device:
    """What choices depend on."""

    name: str
    type: str  # cuda or cpu
    memory_bytes: int | None  # None: not planned with
    taken_bytes: int = CONTEXT  # by this process's CUDA context and by other programs
    capability: tuple[int, int] | None = None  # of a CUDA device
    fast_bf16: str = ""  # of a CPU: how it multiplies bf16 matrices faster than float32's, in words

    @property
    def usable_bytes(self) -> int | None:
        """What a run may plan with; None where memory is not known."""
        return None if self.memory_bytes is None else int(SHARE * self.memory_bytes) - self.taken_bytes


def pick_device(name: str) -> torch.device:
    """auto, cpu, cuda or cuda:N; a CUDA device becomes the current one. Raises ValueError if it is not there."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError:
        raise ValueError(f"--device {name} is unknown. Use auto, cpu, cuda or cuda:N.") from None
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"--device {name}, but PyTorch sees {torch.cuda.device_count()} CUDA devices.")
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        torch.cuda.set_device(device)  # Triton launches on the current device
    elif device.type != "cpu":
        raise ValueError(f"--device {name} is not supported. Use auto, cpu, cuda or cuda:N.")
    return device


def found_device(device: torch.device) -> Device:
    """A device as choices see it. A CPU's memory is not planned with: what does not fit is swapped, not refused."""
    if device.type != "cuda":
        return Device("CPU", device.type, None, fast_bf16=fast_bf16())
    free, total = torch.cuda.mem_get_info(device)
    taken = total - free - torch.cuda.memory_reserved(device)
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    return Device(name, "cuda", total, max(taken, CONTEXT), capability)


@functools.cache
def fast_bf16() -> str:
    """How this CPU multiplies bf16 matrices faster than float32's, in words; "" if it does not."""
    if torch.cpu._is_amx_tile_supported():  # 16 times float32's rate
        return "by tiles (AMX)"
    gain = measured_bf16_gain() if torch.cpu._is_avx512_bf16_supported() else 0.0
    return f"in AVX-512 at {gain:.1f} times float32's rate, measured" if gain >= BF16_GAIN else ""


def compile_pays(flops: float, peak: float | None, compile_s: float) -> tuple[bool, str]:
    """Whether compiling saves more time than it takes, and why. peak: of the card, TFLOP/s; None: as an H200's."""
    run_s = flops / (EAGER * 1e12 * (PEAK_TFLOPS["H200"] if peak is None else peak))
    saved_s = (1 - COMPILED) * run_s
    pays = saved_s > compile_s
    return pays, (
        f"estimated to {'save' if pays else 'save only'} {saved_s / 60:,.2g} of the {run_s / 60:,.2g} minutes that "
        f"{flops / 1e12:,.3g} TFLOP take, and to need {compile_s / 60:.2g} for compiling"
    )


WIDE = 128
"""Channels of a UNet's widest level from which on a CPU's time goes into products and passes over memory; below, calls
cost as much: the toy's 64 are fastest as they are, 256 are not (benchmarks/LOG.md)."""


def network_width(resolved: Resolved | None, model: str) -> int:
    """Channels of a UNet's widest level, or of a transformer; of the published one if nothing is resolved."""
    shipped = {"toy": WEIGHTS, "toy-flow": FLOW_WEIGHTS}.get(model, CONFIGS / model)
    folder = shipped if resolved is None else resolved.config_dir
    unet = folder / "unet" / "config.json"
    if unet.is_file():
        return int(max(read_json(unet)["block_out_channels"]))
    config = transformer_config(resolved) if resolved else read_json(folder / "transformer" / "config.json")
    return int(config["num_attention_heads"] * config["attention_head_dim"])


def fastest_precision(device: Device, width: int) -> Choice:
    """What mixed_precision=auto is there. width: channels of the UNet's widest level."""
    if device.type == "cuda":
        value, why = "fp16", "a GPU; the published runs used it"
    elif not device.fast_bf16:
        value, why = "no", "this CPU has no faster products"
    elif width < WIDE:
        value, why = "no", "the network is narrow"
    else:
        value, why = "bf16", f"this CPU multiplies bf16 {device.fast_bf16}, and the network is wide"
    return Choice("mixed_precision", value, why)


def merges(cfg: Config, device: Device, width: int) -> bool:
    """Whether rollouts use merged weights without being told to: where that is exact, and less work."""
    possible = not (cfg.adapter.full_finetune or cfg.adapter.use_dora) and cfg.engine.base_weights == "full"
    draws = "rollout_weights" in find_method(cfg.objective.method).reads
    is_open = cfg.sample.rollout_weights is None and possible and draws
    return is_open and device.type == "cpu" and width >= WIDE and cfg.model.mixed_precision == "no"


def how_computed(
    cfg: Config, device: Device, pays: Callable[[Config], tuple[bool, str]], width: int
) -> tuple[Config, list[Choice]]:
    """cfg with precision, compile, fuse and a rollout's weights filled in where they were left open, and why.

    pays: whether compiling does (compile_pays), asked of cfg on a GPU only. width: channels of the UNet's widest level.

    Raises ValueError for base weights that the device cannot multiply with.
    """
    choices: list[Choice] = []
    if (rounded := cfg.engine.base_weights) != "full":
        if rounded == "fp8" and device.capability is not None and device.capability < FP8_CAPABILITY:
            has, least = (".".join(map(str, version)) for version in (device.capability, FP8_CAPABILITY))
            raise ValueError(
                f"--base_weights fp8 needs a GPU of compute capability {least} or later; {device.name} has {has}. "
                "Use --base_weights int8 or nf4."
            )
        inexact = "as given. Inexact: policy and reference share a rounded base; its error is printed in iteration 0"
        choices.append(Choice("base_weights", rounded, inexact))

    def take(flag: str, value: str | int | float | bool | None, reason: str) -> None:
        nonlocal cfg
        cfg = cfg.with_fields(**{flag: value})
        choices.append(Choice(flag, value, reason))

    if cfg.adapter.use_dora:
        choices.append(Choice("use_dora", True, "as given. PEFT's layers: the fused operations know plain LoRAs alone"))
    narrow = width < WIDE
    if cfg.model.mixed_precision == "auto":
        precision = fastest_precision(device, width)
        take(precision.flag, precision.value, precision.reason)
    if cfg.engine.compile is None:
        on, why = False, "a CPU waits longer than it gains" if device.type != "cuda" else "--no-fuse"
        if device.type == "cuda" and cfg.engine.fuse is not False:
            several = (False, "each of several sizes would be compiled by itself")
            on, why = pays(cfg) if len(cfg.data.sizes) < 2 else several
        take("compile", "regional" if on else "off", why)
    if cfg.engine.fuse is None:
        engine, wide = cfg.engine, not narrow
        needs = {"memory=balanced": engine.memory == "balanced", f"compile={engine.compile}": engine.compile != "off"}
        needed = next((name for name, need in needs.items() if need), "")
        on = device.type == "cuda" or wide or bool(needed)
        why = "fewer operations and bytes" if device.type == "cuda" or wide else f"{needed} needs it"
        take("fuse", on, why if on else "the network is narrow: a CPU would take more time, for less memory")
    if merges(cfg, device, width):
        take("rollout_weights", "merged", "fewer products on a CPU, exact in float32 but for the order of sums")
    elif cfg.sample.rollout_weights is None:
        cfg = cfg.with_fields(rollout_weights="unmerged")
    return cfg, choices
