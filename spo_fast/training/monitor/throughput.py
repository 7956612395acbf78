"""What an iteration achieved: FLOP/s, their share of the card's peak, images and pairs a second, GPU-hours, energy."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from spo_fast.models.device import peak_tflops
from spo_fast.training.monitor.gpu import nvml_energy_j, nvml_missing
from spo_fast.training.monitor.log import Record, number
from spo_fast.training.plan.costs import WORK, Costs


class Telemetry:
    """Turns an iteration's record and times into what people compare.

    costs: counted FLOPs of an iteration, or None: then nothing is said of FLOPs (a CPU's run does not count them).
    gpu_hours: of the run so far, which go on. devices: of the run, for GPU-hours; FLOPs, memory and
    energy are this one's, images and pairs everybody's.
    """

    def __init__(
        self,
        device: torch.device,
        name: str,
        costs: Costs | None,
        gpu_hours: float = 0.0,
        devices: int = 1,
    ) -> None:
        self.device, self.costs, self.peak, self.devices = device, costs, peak_tflops(name), devices
        self.on_gpu = device.type == "cuda"
        self.gpu_hours = gpu_hours
        self.energy_j = nvml_energy_j(device.index or 0) if self.on_gpu else None
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(device)

    def notes(self) -> list[str]:
        """What will be missing from the log, and why; said once, before the loop."""
        if not self.on_gpu:
            return []
        why = nvml_missing(self.device.index or 0)
        notes = [f"GPU load and energy are not logged: {why}"] if why else []
        return notes + ([] if self.peak else ["this card's peak FLOP/s is not known here: mfu is not logged"])

    def read(self, record: Record, times_ms: Mapping[str, float]) -> dict[str, float]:
        """Of one iteration: record has pairs, valid_share and images; times_ms is the timer's reading.

        tflop: model FLOPs counted from the shapes for this share of valid pairs, in 10^12; recomputed ones not counted.
        tflop_per_s over the phases of WORK; mfu: its share of the card's data-sheet peak. images_per_s: scored;
        pairs_per_s: trained on. gpu_hours: of the run so far, every phase. Of this iteration: joules; peak_memory_gib,
        of tensors; reserved_memory_gib, all that the allocator holds: replayed graphs compute there without allocating.
        """
        seconds = sum(times_ms.get(f"{phase}_ms", 0.0) for phase in WORK) / 1000
        if seconds <= 0:
            return {}
        images, pairs, share = (number(record, name) for name in ("images", "pairs", "valid_share"))
        assert images is not None and pairs is not None
        values = {"images_per_s": images / seconds, "pairs_per_s": pairs / seconds}
        if self.costs is not None:
            values["tflop"] = sum(self.costs.flops(1.0 if share is None else share).values()) / 1e12
            values["tflop_per_s"] = values["tflop"] / seconds
            if self.peak is not None:
                values["mfu"] = values["tflop_per_s"] / self.peak
        if self.on_gpu:
            self.gpu_hours += self.devices * math.fsum(times_ms.values()) / 3.6e6
            values["gpu_hours"] = self.gpu_hours
            values["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
            values["reserved_memory_gib"] = torch.cuda.max_memory_reserved(self.device) / 2**30
            torch.cuda.reset_peak_memory_stats(self.device)
            before, self.energy_j = self.energy_j, nvml_energy_j(self.device.index or 0)
            if before is not None and self.energy_j is not None:
                values["joules"] = self.energy_j - before
        return values
