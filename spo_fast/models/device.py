"""The device of a run, and choices made for it with their reasons."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spo_fast.config.training import Config

GIB = 2**30
SHARE = 0.92  # of the device's memory: the rest is the allocator's fragments and the kernels' workspaces
CONTEXT = GIB // 2  # the CUDA context
FP8_CAPABILITY = (8, 9)  # Ada Lovelace, the first with such products


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
        return Device("CPU", device.type, None)
    free, total = torch.cuda.mem_get_info(device)
    taken = total - free - torch.cuda.memory_reserved(device)
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    return Device(name, "cuda", total, max(taken, CONTEXT), capability)


def how_computed(cfg: Config, device: Device) -> tuple[Config, list[Choice]]:
    """cfg with precision, compile and fuse filled in where they were left open, and why.

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

    def take(flag: str, value: str | bool, reason: str) -> None:
        nonlocal cfg
        cfg = cfg.with_fields(**{flag: value})
        choices.append(Choice(flag, value, reason))

    if cfg.model.mixed_precision == "auto":
        on_gpu = device.type == "cuda"
        why = "a GPU; the published runs used it" if on_gpu else "float32 is fastest on a CPU"
        take("mixed_precision", cfg.model.precision_on(device.type), why)
    if cfg.engine.compile is None:
        cuda, fuse = device.type == "cuda", cfg.engine.fuse is not False
        why = "a CPU waits longer than it gains" if not cuda else "pays off within minutes" if fuse else "--no-fuse"
        take("compile", "regional" if cuda and fuse else "off", why)
    if cfg.engine.fuse is None:
        engine, on = cfg.engine, device.type == "cuda"
        needs = {"memory=balanced": engine.memory == "balanced", f"compile={engine.compile}": engine.compile != "off"}
        why = next(
            (f"{name} needs it" for name, need in needs.items() if need),
            "a CPU would take more time, for less memory",
        )
        take("fuse", on or any(needs.values()), "fewer operations and bytes" if on else why)
    return cfg, choices
