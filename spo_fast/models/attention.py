"""Which attention kernel a fused network runs: on a GPU timed at the start on the run's own shapes, on a CPU PyTorch's.

12 % of SDXL's FLOPs, and which kernel is ahead depends on card, head size and version: so it is measured, not assumed.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q (B, L, H, D), k and v (B, L', H, D) -> (B, L, H, D)
Shape = tuple[tuple[int, ...], tuple[int, ...]]  # of q, of k and v


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's own choice. q, k, v (N, L, heads, D) here and below."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """cuDNN's kernel, called through PyTorch."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    # a shape that cuDNN refuses goes on to the next
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        return sdpa(q, k, v)


def xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """xformers' memory-efficient kernel."""
    from xformers.ops import memory_efficient_attention  # type: ignore[import-not-found]

    return memory_efficient_attention(q, k, v)


def flash3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention 3."""
    from flash_attn_interface import flash_attn_func  # type: ignore[import-not-found]

    out = flash_attn_func(q, k, v)
    return out[0] if isinstance(out, tuple) else out  # releases differ in whether the log-sum comes too


KERNELS: dict[str, Attend] = {"sdpa": sdpa, "cudnn": cudnn, "xformers": xformers, "flash3": flash3}
PACKAGES = {"xformers": "xformers", "flash3": "flash_attn_interface"}
TRACED = ("sdpa", "cudnn")
"""What torch.compile sees into; the others would break a graph."""


def attend_with(unet: nn.Module, attend: Attend) -> None:
    """Another kernel for a fused network's attentions."""
    for module in unet.modules():
        if hasattr(module, "attend"):
            module.attend = attend  # type: ignore[assignment]


def why_not(name: str, device_type: str, dtype: torch.dtype, compiled: bool) -> str | None:
    """None if this kernel can run here, else the reason."""
    if name == "sdpa":
        return None
    if device_type != "cuda":
        return "it needs a CUDA device"
    if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
        return f"the package {PACKAGES[name]} is not installed"
    if name == "flash3" and (major := torch.cuda.get_device_capability()[0]) != 9:
        return f"it is written for Hopper (sm_90), this is sm_{major}x"
    if dtype not in (torch.float16, torch.bfloat16) and name != "xformers":
        return "it computes in 16 bits"
    if compiled and name not in TRACED:
        return "torch.compile cannot look into it (--compile off)"
    return None


def pick(
    name: str,
    shapes: Mapping[Shape, int],  # of one forward, and how often each occurs
    device_type: str,
    dtype: torch.dtype,
    compiled: bool,
    measure: Callable[[Attend, Shape], float],  # milliseconds of a forward and a backward
) -> tuple[str, str]:
    """(kernel, reason) for --attention name. Raises ValueError for a kernel that cannot run here."""
    if name != "auto":
        if reason := why_not(name, device_type, dtype, compiled):
            raise ValueError(f"--attention {name} cannot run here: {reason}. Use --attention auto or sdpa.")
        return name, "given"
    able = [kernel for kernel in KERNELS if why_not(kernel, device_type, dtype, compiled) is None]
    if len(able) == 1:
        return able[0], f"nothing else runs on this {device_type}"
    ms = {k: sum(count * measure(KERNELS[k], shape) for shape, count in shapes.items()) for k in able}
    best = min(able, key=lambda kernel: ms[kernel])
    timed = ", ".join(f"{kernel} {ms[kernel]:.2f}" for kernel in sorted(able, key=lambda kernel: ms[kernel]))
    return best, f"timed, ms of all layers forward and backward: {timed}"


def time_on_gpu(attend: Attend, shape: Shape, dtype: torch.dtype) -> float:
    """Milliseconds of a forward and a backward, the best of 5; infinite if the kernel refuses the shape."""
    q, k, v = (torch.randn(s, device="cuda", dtype=dtype, requires_grad=True) for s in (shape[0], shape[1], shape[1]))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(8):  # the first ones warm up
        start.record()
        try:
            attend(q, k, v).sum().backward()
        except (RuntimeError, NotImplementedError, ValueError):
            return float("inf")
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return min(times[3:])


@torch.no_grad()
def shapes_of(network: nn.Module, forward: Callable[[], object]) -> Counter[Shape]:
    """The attentions of one forward of a fused network; the forward runs, on fake tensors if the network's are."""
    seen: Counter[Shape] = Counter()

    def record(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen[tuple(q.shape), tuple(k.shape)] += 1
        return sdpa(q, k, v)

    layers = [m for m in network.modules() if hasattr(m, "attend")]
    before = [layer.attend for layer in layers]
    attend_with(network, record)
    try:
        forward()
    finally:
        for layer, attend in zip(layers, before, strict=True):
            layer.attend = attend
    return seen
