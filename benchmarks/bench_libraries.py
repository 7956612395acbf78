"""Ceilings of the machine, and whether the optional libraries beat PyTorch's own at our shapes."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.records import Records
from benchmarks.shapes import AttentionShape, attention_shapes, lora_shapes
from benchmarks.timing import copy_bandwidth, measure, relative_error


def run_ceilings(records: Records, size: str, device: str) -> None:
    """Copy bandwidth and the 16-bit matrix rate, on random data (zeros run faster)."""
    records.write("copy", dtype="float32", **copy_bandwidth(device, size))
    n = 8192 if size == "full" else 64
    for dtype in (torch.bfloat16, torch.float16):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        times = measure(functools.partial(torch.matmul, a, b), device)
        rate = 2 * n**3 / times["p50_ms"] / 1e9
        records.write("matmul", dtype=str(dtype)[6:], shapes={"n": n}, tflop_per_s=rate, **times)


# ---------------------------------------------------------------------------------------------------- optimizers


def torch_adamw(parameters: Sequence[Tensor], **options: Any) -> Any:
    return torch.optim.AdamW(parameters, lr=1e-5, weight_decay=1e-4, **options)


def bitsandbytes_adamw(name: str, parameters: Sequence[Tensor]) -> Any:
    import bitsandbytes

    return getattr(bitsandbytes.optim, name)(parameters, lr=1e-5, weight_decay=1e-4)


OPTIMIZERS: dict[str, Callable[[Sequence[Tensor]], Any]] = {
    "torch AdamW foreach": functools.partial(torch_adamw, foreach=True),
    "torch AdamW fused": functools.partial(torch_adamw, fused=True),
    "bitsandbytes AdamW8bit": functools.partial(bitsandbytes_adamw, "AdamW8bit"),
    "bitsandbytes PagedAdamW8bit": functools.partial(bitsandbytes_adamw, "PagedAdamW8bit"),
}


def run_optimizers(records: Records, size: str, device: str) -> None:
    """One step on the float32 masters of SDXL's LoRA of rank 64, in their real shapes."""
    shapes = lora_shapes("sdxl", 64 if size == "full" else 4, size)
    count = sum(a * b for a, b in shapes)
    common: dict[str, Any] = {"dtype": "float32", "shapes": {"parameters": count, "tensors": len(shapes)}}
    for name, make in OPTIMIZERS.items():
        gc.collect()
        try:
            parameters = [torch.nn.Parameter(torch.randn(s, device=device)) for s in shapes]
            for p in parameters:
                p.grad = torch.randn_like(p)
            optimizer = make(parameters)
            before = allocated(device)
            optimizer.step()
            state_gib = (allocated(device) - before) / 2**30 if device == "cuda" else None
            records.write(name, **common, state_gib=state_gib, **measure(optimizer.step, device))
        except ImportError as error:
            records.write(name, "skipped", reason=str(error), **common)
        except Exception as error:
            records.failed(name, error, **common)


def allocated(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else 0


# ---------------------------------------------------------------------------------------------------- attention


def sdpa(backend: str | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # (B, L, heads, width)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if backend is None:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    with sdpa_kernel(getattr(SDPBackend, backend)):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def xformers_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(q, k, v)


ATTENTIONS: dict[str, Callable[..., Tensor]] = {
    "sdpa automatic": functools.partial(sdpa, None),
    "sdpa flash": functools.partial(sdpa, "FLASH_ATTENTION"),
    "sdpa cudnn": functools.partial(sdpa, "CUDNN_ATTENTION"),
    "sdpa efficient": functools.partial(sdpa, "EFFICIENT_ATTENTION"),
    "xformers": xformers_attention,
}


def run_attention(records: Records, size: str, device: str) -> None:
    dtype = torch.float16 if device == "cuda" else torch.float32
    for shape in attention_shapes(size):
        for name, attention in ATTENTIONS.items():
            for backward in (False, True):
                time_attention(records, shape, name, attention, backward, device, dtype)


def time_attention(
    records: Records,
    shape: AttentionShape,
    name: str,
    attention: Callable[..., Tensor],
    backward: bool,
    device: str,
    dtype: torch.dtype,
) -> None:
    full = f"{shape.name} {'forward+backward' if backward else 'forward'}"
    common: dict[str, Any] = {"contender": name, "dtype": str(dtype)[6:], "shapes": vars(shape)}
    try:
        draw = functools.partial(torch.randn, device=device)
        q = draw(shape.batch, shape.queries, shape.heads, shape.width).to(dtype)
        k, v = (draw(shape.batch, shape.keys, shape.heads, shape.width).to(dtype) for _ in range(2))
        # float32 and the plain backend: the yardstick, on a part of the batch (its matrix of scores is large)
        exact = sdpa("MATH", *(x[:1].float() for x in (q, k, v)))
        error = relative_error(attention(q, k, v)[:1], exact)
        flop = 4 * shape.batch * shape.heads * shape.queries * shape.keys * shape.width * (3.5 if backward else 1)
        q, k, v = (x.requires_grad_(backward) for x in (q, k, v))
        gradient = torch.randn_like(q)

        def call() -> Any:
            out = attention(q, k, v)
            return torch.autograd.grad(out, (q, k, v), gradient) if backward else out

        times = measure(call, device)
        records.write(full, **common, **times, max_error=error, tflop_per_s=flop / times["p50_ms"] / 1e9)
    except ImportError as error:
        records.write(full, "skipped", reason=str(error), **common)
    except Exception as error:
        records.failed(full, error, **common)


def run(records: Records, size: str, device: str) -> None:
    run_optimizers(records, size, device)
    run_attention(records, size, device)
