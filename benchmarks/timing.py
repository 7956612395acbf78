"""How a call is timed: events around it, and inside a CUDA graph, where launches cost nothing."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.records import Records, quantiles
from spo_fast.models.graphs import CudaCapture
from spo_fast.ops import backend

L2_BYTES = 128 << 20  # rotate inputs over more than twice the largest cache in use (60 MB)


REPEAT_MS = 40  # a median of hundreds of microseconds, of eight for the slowest op
WARM_UP_MS = 10


def measure(fn: Callable[[], Any], device: str, rep_ms: int = REPEAT_MS) -> dict[str, Any]:
    """Quantiles of one call. CUDA: events, the L2 cache flushed before each (do_bench). Else the host's."""
    if device == "cuda":
        from triton.testing import do_bench

        return quantiles(do_bench(fn, warmup=WARM_UP_MS, rep=rep_ms, return_mode="all"))
    fn()
    times: list[float] = []
    end = time.perf_counter() + min(rep_ms, 20) / 1000
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        fn()
        times.append(1000 * (time.perf_counter() - start))
    return quantiles(times)


def measure_in_graph(calls: Sequence[Callable[[], Any]], rep_ms: int = REPEAT_MS) -> dict[str, Any]:
    """Quantiles of one call out of a CUDA graph of all of them, which should rotate among inputs."""
    from triton.testing import do_bench

    replay, _ = capture(lambda: [call() for call in calls])
    times = do_bench(replay, warmup=WARM_UP_MS, rep=rep_ms, return_mode="all")
    return quantiles([t / len(calls) for t in times])


def capture(fn: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
    """What replays fn as a CUDA graph, and what it returned, which each replay rewrites. Warmed up for autotuning."""
    cuda = CudaCapture(torch.device("cuda", torch.cuda.current_device()))
    for _ in range(3):
        cuda.warm_up(fn)
    return cuda.record(fn)


def copy_bandwidth(device: str, size: str = "full") -> dict[str, Any]:
    """Device-to-device copy of random data, bytes read plus bytes written: "tb_per_s"."""
    n = 2 << 30 if size == "full" else 1 << 20
    source = torch.empty(n // 4, device=device).uniform_()
    target = torch.empty_like(source)
    times = measure(lambda: target.copy_(source), device)
    return {**times, "bytes": 2 * n, "tb_per_s": 2 * n / times["p50_ms"] / 1e9}


def relative_error(got: Any, truth: Any) -> float:
    """Largest max |got - truth| / max |truth| over the outputs; inf if anything is not finite or was never written."""
    worst = 0.0
    for g, t in zip(_tensors(got), _tensors(truth), strict=True):
        if g.shape != t.shape or not bool(torch.isfinite(g).all()):
            return float("inf")
        if t.numel():
            difference = (g.double() - t.double()).abs().max()
            worst = max(worst, float(difference / t.double().abs().max().clamp_min(1e-30)))
    return worst


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for part in value if part is not None for t in _tensors(part)]


@dataclass(frozen=True)
class Case:
    """One call at one shape."""

    name: str
    dtype: str
    shapes: dict[str, Any]
    bytes_moved: int  # the least: every input read once, every output written once
    make: Callable[[int], tuple]  # seed -> inputs
    truth: Callable[..., Any]  # float64, from the formula
    contenders: dict[str, Callable[..., Any]]  # name -> function of the inputs
    skipped: dict[str, str]  # name -> why it cannot run here
    flops: int = 0  # 2 a multiplication and addition; 0: bound by memory


def time_case(case: Case, records: Records, device: str, tb_per_s: float | None, rep_ms: int = REPEAT_MS) -> list[dict]:
    """A record a contender: error against float64, time alone, time in a graph, share of the copy bandwidth."""
    sets = 2 if device != "cuda" else max(2, min(64, -(-L2_BYTES // max(case.bytes_moved, 1))))
    common: dict[str, Any] = {"dtype": case.dtype, "shapes": case.shapes, "bytes": case.bytes_moved}
    common |= {"flops": case.flops} if case.flops else {}
    written = []
    for name, reason in case.skipped.items():
        records.write(case.name, "skipped", contender=name, reason=reason, **common)
    try:
        inputs = [case.make(seed) for seed in range(sets)]
        truth = case.truth(*inputs[0])
    except Exception as error:  # memory, most likely: the other shapes are still to come
        records.failed(case.name, error, **common)
        return written
    for name, fn in case.contenders.items():
        try:
            torch._dynamo.reset()  # all shapes compile one function: its limit of recompilations is not theirs
            values: dict[str, Any] = {"max_error": relative_error(fn(*inputs[0]), truth)}
            # errors are of fresh inputs too: a kernel that left last run's output in place would pass the first
            values["max_error"] = max(values["max_error"], relative_error(fn(*inputs[1]), case.truth(*inputs[1])))
            values |= measure(functools.partial(fn, *inputs[0]), device, rep_ms)
            if device == "cuda":
                calls = [functools.partial(fn, *x) for x in inputs]
                values |= {f"graph_{k}": v for k, v in measure_in_graph(calls, rep_ms).items()}
                if case.flops:
                    values["tflop_per_s"] = case.flops / values["graph_p50_ms"] / 1e9
                values["tb_per_s"] = case.bytes_moved / values["graph_p50_ms"] / 1e9
                if tb_per_s:
                    values["bandwidth_share"] = values["tb_per_s"] / tb_per_s
            written.append(records.write(case.name, contender=name, **common, **values))
        except Exception as error:
            records.failed(case.name, error, contender=name, **common)
    return written


def time_cases(cases: Sequence[Case], records: Records, device: str, size: str) -> None:
    """time_case of each, their shares those of this machine's copy bandwidth."""
    tb_per_s = copy_bandwidth(device, size)["tb_per_s"] if device == "cuda" else None
    for case in cases:
        time_case(case, records, device, tb_per_s)


# ---------------------------------------------------------------------------------------------------- on a CPU

TURNS = 5
TURN_MS = 20  # of a contender, at least


def cpu_ms(fn: Callable[[], Any]) -> float:
    """CPU milliseconds of one call, of as many as fill a turn, after one that finds the caches as others left them."""
    fn()
    calls, start = 0, time.process_time()
    while calls == 0 or time.process_time() - start < TURN_MS / 1000:
        fn()
        calls += 1
    return 1000 * (time.process_time() - start) / calls


def compare_on_cpu(case: Case, records: Records, turns: int = TURNS) -> None:
    """A record a contender: its error, its CPU time, and its ratio to "ours": of each turn, in which all had theirs."""
    inputs, again = case.make(0), case.make(1)
    common = {"dtype": case.dtype, "shapes": case.shapes, "bytes": case.bytes_moved}
    torch._dynamo.reset()  # all shapes compile one function: its limit of recompilations is not theirs
    errors = dict.fromkeys(case.contenders, 0.0)
    for x in (inputs, again):  # a kernel that left last run's output in place would pass the first
        truth = case.truth(*x)
        for name, fn in case.contenders.items():
            errors[name] = max(errors[name], relative_error(fn(*x), truth))
    times: dict[str, list[float]] = {name: [] for name in case.contenders}
    for turn in range(turns):
        order = [*times]
        for name in order[turn % len(order) :] + order[: turn % len(order)]:  # nobody always follows the same one
            times[name].append(cpu_ms(functools.partial(case.contenders[name], *inputs)))
    for name, mine in times.items():
        ratios = sorted(a / b for a, b in zip(mine, times["ours"], strict=True))
        values: dict[str, Any] = {f"cpu_{k}" if k.endswith("ms") else k: v for k, v in quantiles(mine).items()}
        values["to_ours"] = [ratios[0], ratios[len(ratios) // 2], ratios[-1]]
        if name == "ours":
            values["chosen"] = backend.choose(case.name.split()[0], inputs[0])
        threads = torch.get_num_threads()
        records.write(case.name, contender=name, max_error=errors[name], threads=threads, **common, **values)
