"""What a host that reads zeros would decide wrongly, decided for it. Everything that this instrument assumes about the
package's names stands here; a name that is gone is left alone, and said (`missing`).

On a null GPU every number that comes from a kernel is 0. So a rollout would keep no pair, a clamp would seem to hold
every micro-batch, and states would be numbered by zeros. Each patch reads what the host reads in an iteration, so that
its waits count.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.nullgpu.ledger import Ledger

missing: list[str] = []


def apply(ledger: Ledger, valid_share: float = 1.0) -> None:
    """All of them. valid_share: of a rollout's comparisons, how many are kept."""
    missing.clear()
    for (module, name), wrapper in PATCHES.items():
        *path, last = name.split(".")
        try:
            holder: Any = importlib.import_module(module)
            for part in path:
                holder = getattr(holder, part)
            setattr(holder, last, wrapper(getattr(holder, last), ledger, valid_share))
        except (ImportError, AttributeError):
            missing.append(f"{module}.{name}")
    torch.backends.cuda.enable_cudnn_sdp(False)  # whose plans the stub of cuDNN does not make


def _no_cudnn(plain: Any, *_: Any) -> Any:
    """attention.why_not(name, ...) -> why an attention kernel cannot run."""
    return lambda name, *rest: "a null GPU has no cuDNN attention" if name == "cudnn" else plain(name, *rest)


def _counted_phase(plain: Any, ledger: Ledger, *_: Any) -> Any:
    """Timer.__call__(phase) is a context manager."""

    @contextmanager
    def timed(self: Any, phase: str) -> Iterator[None]:
        with ledger.phase(phase), plain(self, phase):
            yield

    return timed


def _scripted(plain: Any, ledger: Ledger, valid_share: float) -> Any:
    """Segments.compact reads self.valid, (J, B) bool."""

    def compact(self: Any, cond: Any) -> Any:
        valid = torch.zeros(self.valid.numel(), dtype=torch.bool)
        kept = torch.randperm(len(valid), generator=torch.Generator().manual_seed(0))
        valid[kept[: round(valid_share * len(valid))]] = True
        with ledger.paused():  # the copy there is ours, the one back is the rollout's read
            self.valid.copy_(valid.view(self.valid.shape))
        return plain(self, cond)

    return compact


def _unjudged(*_: Any) -> Any:
    """check_finite(tensors, ...) raises where `isfinite` gives 0, StepSizes.look(size) where a size went to 0."""
    return lambda *args, **kwargs: None


def _finite(*_: Any) -> Any:
    """is_finite(row) -> whether its numbers are finite: a large copy to the host is counted, not made."""
    return lambda row: True


def _one(*_: Any) -> Any:
    """deviation(latents) -> float, by which the large toy's latents are divided."""
    return lambda latents: float(latents.std()) or 1.0  # the read counts


def _alive(plain: Any, *_: Any) -> Any:
    """Learner.is_dead(stats) -> () bool, or False; computed, and not read."""
    return lambda self, stats: plain(self, stats) is None


def _on_host(plain: Any, ledger: Ledger, *_: Any) -> Any:
    """As unique, whose values are the host's and whose one wait (for how many they are) is counted."""

    def unique(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not x.is_cuda:
            return plain(x, *args, **kwargs)
        x.flatten()[:1].cpu()
        with ledger.paused():
            found = plain(x.cpu(), *args, **kwargs)
            return tuple(v.to(x.device) for v in found) if isinstance(found, tuple) else found.to(x.device)

    return unique


PATCHES = {  # module and name: (what is there, ledger, valid_share) -> what takes its place
    ("spo_fast.data.weights", "check_finite"): _unjudged,  # first: others import the function by its name
    ("spo_fast.models.attention", "why_not"): _no_cudnn,
    ("spo_fast.training.monitor.timer", "Timer.__call__"): _counted_phase,
    ("spo_fast.method.rollout", "Segments.compact"): _scripted,
    ("spo_fast.training.learner", "Learner.is_dead"): _alive,
    ("spo_fast.training.step_sizes", "StepSizes.look"): _unjudged,
    ("spo_fast.models.tensor_cache", "is_finite"): _finite,
    ("spo_fast.models.files.toy", "deviation"): _one,
    ("torch", "unique"): _on_host,
    ("torch", "Tensor.unique"): _on_host,
}
