"""What an iteration achieved, from counted FLOPs and given times."""

from __future__ import annotations

import types

import pytest
import torch

from spo_fast.training.monitor import gpu, throughput
from spo_fast.training.monitor.throughput import Telemetry, peak_tflops
from spo_fast.training.plan.costs import Costs

COSTS = Costs(
    samples={"rollout": 1},
    full_flops={"rollout": 6 * 10**12, "score": 2 * 10**12, "reference": 4 * 10**12, "policy": 8 * 10**12},
    flops_per_prompt=0,
    resident={"optimizer state": 0},
    gradients=0,
    transient={},
)
TIMES = {"rollout_ms": 1000.0, "score_ms": 500.0, "reference_ms": 500.0, "backward_ms": 1900.0, "step_ms": 100.0}
RECORD = {"images": 40, "pairs": 10, "valid_share": 0.5}


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA RTX 6000 Ada Generation", 364),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("CPU", None),
    ],
)
def test_peaks_by_name(name, peak):
    assert peak_tflops(name) == peak


def test_flops_a_second_and_their_share_of_the_peak():
    values = Telemetry(torch.device("cpu"), "NVIDIA H200", COSTS).read(RECORD, {**TIMES, "save_ms": 9e9})
    # 6 + 2 + half of 4 + 8 in 4 s
    assert values == {
        "images_per_s": 10.0,
        "pairs_per_s": 2.5,
        "tflop": 14.0,
        "tflop_per_s": 3.5,
        "mfu": pytest.approx(3.5 / 989),
    }


def test_without_counted_flops_or_times():
    silent = Telemetry(torch.device("cpu"), "CPU", None)
    assert silent.read(RECORD, TIMES) == {"images_per_s": 10.0, "pairs_per_s": 2.5}
    assert silent.read(RECORD, {}) == {} and silent.notes() == []


def test_gpu_hours_and_energy_go_on_after_a_resume(monkeypatch):
    meter = iter([1000.0, 1750.0, None])
    monkeypatch.setattr(throughput, "nvml_energy_j", lambda index: next(meter))
    monkeypatch.setattr(throughput, "nvml_missing", lambda index: None)
    peaks = {"max_memory_allocated": 3 * 2**30, "max_memory_reserved": 4 * 2**30}
    for name, value in {"reset_peak_memory_stats": None, **peaks}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    hours = Telemetry(torch.device("cuda"), "a new card", COSTS, 2.0)
    assert hours.notes() == ["this card's peak FLOP/s is not known here: mfu is not logged"]
    first = hours.read(RECORD, {**TIMES, "save_ms": 3.2e6})
    assert first["joules"] == 750.0 and first["peak_memory_gib"] == 3.0 and "mfu" not in first
    assert first["reserved_memory_gib"] == 4.0
    assert first["gpu_hours"] == pytest.approx(2.0 + 3_204_000 / 3.6e6)
    second = hours.read(RECORD, TIMES)
    assert "joules" not in second and second["gpu_hours"] > first["gpu_hours"]


def test_what_nvml_lacks_is_said(monkeypatch):
    gpu._nvml.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    (note,) = Telemetry(torch.device("cuda", 0), "NVIDIA H200", COSTS).notes()
    assert "nvidia-ml-py is not installed" in note and "spo_fast[nvml]" in note
    gpu._nvml.cache_clear()


def test_energy_by_nvml(monkeypatch):
    class NVMLError(Exception): ...

    def unsupported(handle):
        raise NVMLError("Not Supported")

    nvml = types.SimpleNamespace(NVMLError=NVMLError, nvmlDeviceGetTotalEnergyConsumption=lambda handle: 2_500)
    monkeypatch.setitem(__import__("sys").modules, "pynvml", nvml)
    monkeypatch.setattr(gpu, "nvml_handle", lambda index: "handle")
    assert gpu.nvml_energy_j(0) == 2.5
    nvml.nvmlDeviceGetTotalEnergyConsumption = unsupported
    assert gpu.nvml_energy_j(0) is None
