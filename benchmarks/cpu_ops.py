"""The op table of a CPU: our automatic choice beside eager, the C library and torch.compile, one thread, real shapes.

`pytest benchmarks/test_ops.py -k cpu` times them (about five minutes, most of it compiling) and prints the table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import (
    bench_geglu,
    bench_group_norm_silu,
    bench_linear,
    bench_merge_lora,
    bench_resize_normalize,
    bench_transition,
)
from benchmarks.records import table
from benchmarks.shapes import LATENTS, LayerShape, LoraShape, RatioShape, ScorerShape, StepShape
from benchmarks.timing import Case

F32, BF16 = torch.float32, torch.bfloat16
COMPILED = ("default",)
NORMS = [  # of a forward with both guidance halves; the first is compiled, too
    LayerShape("sd15 320x64x64", (2, 320, 64, 64), 1, 32, True),
    LayerShape("sd15 1280x16x16", (2, 1280, 16, 16), 1, 32, True),
    LayerShape("sd15 1280x8x8", (2, 1280, 8, 8), 1, 32, True),
    LayerShape("sdxl 320x128x128", (2, 320, 128, 128), 1, 32, True),
    LayerShape("sdxl 1280x32x32", (2, 1280, 32, 32), 1, 32, True),
    LayerShape("toy 32x8x8", (8, 32, 8, 8), 1, 8, True),
]


def cases() -> list[Case]:
    """Latents of one and of ten parents, a micro-batch's log-ratios, a UNet's norms and layers, decoded images."""
    transition, log_ratio = bench_transition.transition_case, bench_transition.log_ratio_case
    few = StepShape("sd15 B=1 K=4", 1, 4, LATENTS["sd15"])
    many = StepShape("sd15 B=10 K=4", 10, 4, LATENTS["sd15"])
    wide = StepShape("sdxl B=2 K=4", 2, 4, LATENTS["sdxl"])
    found = [transition(few, F32, "cpu", COMPILED), transition(wide, F32, "cpu", COMPILED)]
    found += [transition(many, dtype, "cpu", COMPILED) for dtype in (F32, BF16)]
    supplied = StepShape("sd15 B=10 K=4 supplied", 10, 4, LATENTS["sd15"])
    found += [transition(supplied, F32, "cpu", COMPILED, supplied=True)]
    found += [transition(StepShape("sd15 B=40 x0", 40, 0, LATENTS["sd15"]), F32, "cpu", COMPILED)]
    for kind, dtype in (("sd15", F32), ("sdxl", BF16)):
        ratios = RatioShape(f"{kind} U=8", 8, 16, LATENTS[kind])
        found += [log_ratio(ratios, dtype, "cpu", COMPILED, backward) for backward in (False, True)]
    for shape in NORMS:
        modes, backward = COMPILED if shape is NORMS[0] else (), math.prod(shape.x) < 2_700_000
        for dtype in (F32, BF16):
            for channels_last in (False, True):
                found.append(bench_group_norm_silu.case(shape, dtype, "cpu", modes, channels_last, backward))
    gate = LayerShape("sd15 4096x2560", (2, 4096, 2560), 1)
    for dtype, backward in ((F32, False), (F32, True), (BF16, False), (BF16, True)):
        found.append(bench_geglu.case(gate, dtype, "cpu", COMPILED, backward))
    for pixels in (512, 1024):
        shape = ScorerShape(f"{pixels} N=2", 2, pixels, 224)
        for dtype, last in ((F32, False), (BF16, False), (BF16, True)):
            modes = COMPILED if dtype == F32 else ()
            found.append(bench_resize_normalize.resize_normalize_case(shape, dtype, "cpu", modes, last))
    layer = LoraShape("sdxl 1280x1280", 1, 1, 1280, 1280, 64)
    for wide in (LoraShape("sd15 320x320", 2, 4096, 320, 320, 4), LoraShape("sdxl 1280x1280", 2, 1024, 1280, 1280, 64)):
        found += [bench_linear.case(wide, F32, "cpu", COMPILED, backward) for backward in (False, True)]
    return [*found, bench_merge_lora.merge_case(layer, BF16, "cpu", COMPILED)]


def summary(records: Sequence[dict[str, Any]]) -> str:
    """A line a case: our choice and its median, and the others' times over ours: least, median, most of the turns."""
    rows: list[list[Any]] = [["op", "type", "chosen", "ours, ms", "eager / ours", "c / ours", "compile / ours"]]
    for mine in (r for r in records if r["contender"] == "ours"):
        same = {r["contender"]: r for r in records if (r["name"], r["dtype"]) == (mine["name"], mine["dtype"])}
        ratios = [
            "{:.2f} {:.2f} {:.2f}".format(*same[n]["to_ours"]) if n in same else "" for n in ("eager", "c", "compile")
        ]
        rows.append([mine["name"], mine["dtype"], mine["chosen"], mine["cpu_p50_ms"], *ratios])
    return table(rows)
