"""Several processes of one run: who does what, and what they send each other.

Every process rolls out its part of the global batch. The pairs that are valid then form one list, in the order in which
a single process would have them; it is permuted once, cut into optimizer steps, and each step's terms are dealt out
evenly. So no process waits for another that kept more pairs, and a run on W processes computes what one process does
with W times the batch sizes. Only the terms themselves travel, each to its one owner; the LoRA's gradients are added up
in one flat bucket before a step (SDXL, rank 4: 23 MB, far below a backward's time, so it is not overlapped with one).
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from spo_fast.config.errors import RunError
from spo_fast.method.experience import Rows

if TYPE_CHECKING:
    from spo_fast.config.training import Config

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun and accelerate launch set

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """The processes of a run. Alone, every method returns at once what it was given."""

    rank: int = 0
    size: int = 1
    host: dist.ProcessGroup | None = None
    """gloo, for what is in host memory; it waits for days, as process 0 draws sample grids meanwhile"""

    @property
    def main(self) -> bool:
        """Process 0, which alone writes files and prints."""
        return self.rank == 0

    def share(self, whole: Rows, rank: int | None = None) -> Rows:
        """A process's part of some consecutive things; parts differ by one at most and may be empty."""
        rank, n = self.rank if rank is None else rank, whole.stop - whole.start
        return slice(whole.start + rank * n // self.size, whole.start + (rank + 1) * n // self.size)

    def add(self, tensors: list[Tensor]) -> None:
        """In place: the sum over all processes, by one all-reduce. All of one dtype and device."""
        if self.size == 1:
            return
        flat = torch.cat([t.flatten() for t in tensors])
        with _peers():
            dist.all_reduce(flat)
        for t, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.copy_(total.view_as(t))

    def gather(self, rows: Tensor) -> list[Tensor]:  # (n, ...), n and nothing else differing between processes
        """Everybody's rows, in host memory unless alone."""
        if self.size == 1:
            return [rows]
        rows = rows.cpu().contiguous()
        with _peers():
            counts = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(counts, torch.tensor([len(rows)]), group=self.host)
            most = max(int(n) for n in counts)
            padded = rows.new_zeros(most, *rows.shape[1:])
            padded[: len(rows)] = rows
            found = [torch.empty_like(padded) for _ in range(self.size)]
            dist.all_gather(found, padded, group=self.host)
        return [part[: int(n)] for part, n in zip(found, counts, strict=True)]

    def exchange(self, parts: list[Tensor]) -> list[Tensor]:  # (n_r, ...) for each process r -> (m_r, ...) from each
        """Everybody's part for each process goes there, in host memory and any dtype. Alone: what was given."""
        if self.size == 1:
            return parts
        like, sent = parts[0], torch.tensor([[len(part) for part in parts]])
        got = [int(counts[0, self.rank]) for counts in self.gather(sent)]
        width = like[:0].flatten(1).shape[1] if like.ndim > 1 else 1
        data = torch.cat(parts).reshape(-1, width).contiguous().view(torch.uint8)  # bytes: any dtype may travel
        received = data.new_empty(sum(got), data.shape[1])
        with _peers():
            dist.all_to_all_single(received, data, got, sent[0].tolist())
        return list(received.view(like.dtype).reshape(-1, *like.shape[1:]).split(got))

    def any(self, flag: bool) -> bool:
        """Whether any process says so. All wait for the last one here, process 0 with its files included."""
        if self.size == 1:
            return flag
        found = torch.tensor([int(flag)])
        with _peers():
            dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.host)
        return bool(found)

    def total(self, count: int) -> int:
        """The sum over all processes."""
        return sum(int(n) for n in self.gather(torch.tensor([count])))

    def from_main(self, value: T) -> T:
        """Process 0's value."""
        if self.size == 1:
            return value
        box = [value]
        with _peers():
            dist.broadcast_object_list(box, group=self.host)
        return box[0]

    def leave(self) -> None:
        """The end of the group; what is sent after it raises."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


ALONE = Group()


@contextlib.contextmanager
def _peers() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # a connection that a process's end has closed; all of torch.distributed's errors
        raise RunError(
            "another process of this run has ended, so this one cannot go on "
            f"({' '.join(str(error).split())[:100]}). --resume_from_checkpoint latest goes on from the last checkpoint."
        ) from error


def world_size() -> int:
    """Processes that were launched together; 1 alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def sharing(cfg: Config) -> int:
    """Over how many the masters and the optimizer's state are sharded: those that this one was launched with."""
    return world_size() if cfg.adapter.full_finetune else 1


def own_device(name: str) -> str:
    """--device as this process takes it: each of a node has a GPU of its own."""
    if world_size() > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return name


def join(device: torch.device) -> Group:
    """The group that torchrun or accelerate launch made; alone without them. NCCL between GPUs, gloo for the rest."""
    if world_size() == 1:
        return ALONE
    missing = [name for name in LAUNCHED if name not in os.environ]
    if missing:
        raise ValueError(f"WORLD_SIZE is set, but not {', '.join(missing)}. Start with torchrun or accelerate launch.")
    with _peers():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        host = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))
    return Group(dist.get_rank(), dist.get_world_size(), host)
