"""Load, memory and energy of the GPUs, by NVML."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


def gpu_stats(device_index: int = 0) -> dict[str, float]:
    """Load of a CUDA device by NVML; {} without nvidia-ml-py, a driver or the device. Costs well under a millisecond.

    gpu_utilisation_percent, gpu_memory_used_gib, gpu_memory_total_gib (the whole card's, other processes included),
    gpu_power_w; a value this card does not report (MIG has no utilisation) is left out.
    device_index: as torch counts, so CUDA_VISIBLE_DEVICES is respected.
    """
    handle = nvml_handle(device_index)
    if handle is None:
        return {}
    import pynvml

    readings: dict[str, Callable[[], float]] = {
        "gpu_utilisation_percent": lambda: float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu),
        "gpu_memory_used_gib": lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).used / 2**30,
        "gpu_memory_total_gib": lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30,
        "gpu_power_w": lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
    }
    stats = {}
    for name, read in readings.items():
        try:
            stats[name] = read()
        except pynvml.NVMLError:
            continue
    return stats


def nvml_energy_j(device_index: int = 0) -> float | None:
    """Joules the device has drawn since its driver was loaded; None if it does not say."""
    handle = nvml_handle(device_index)
    if handle is None:
        return None
    import pynvml

    try:
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
    except pynvml.NVMLError:
        return None


def nvml_handle(device_index: int) -> object | None:
    """NVML's handle of a torch device, found by its UUID: NVML counts all cards, torch only the visible ones.

    What it is only NVML knows. None: nvml_missing says why."""
    return _nvml(device_index)[0]


def nvml_missing(device_index: int) -> str | None:
    """Why there is no handle; None if there is one."""
    return _nvml(device_index)[1]


@functools.lru_cache
def _nvml(device_index: int) -> tuple[object | None, str | None]:
    try:
        import pynvml
    except ImportError:
        return None, "nvidia-ml-py is not installed (pip install 'spo_fast[nvml]')"
    if device_index >= torch.cuda.device_count():
        return None, f"there is no CUDA device {device_index}"
    try:
        pynvml.nvmlInit()
        name = f"GPU-{torch.cuda.get_device_properties(device_index).uuid}"
        return pynvml.nvmlDeviceGetHandleByUUID(name), None
    except pynvml.NVMLError as error:
        return None, f"NVML says {error}"
