"""Float32 masters in parts, one a process: full fine-tuning on several of them, by FSDP2 (torch's fully_shard).

Each process has its part of the masters and of the optimizer's state; the network's own weights stay whole and in
place: they are gathered once an optimizer step, and its gradients are added up and dealt out once. So no forward waits
for another process: rollouts, micro-batches and validation may differ between them, and graphs keep their addresses.
SDXL in 16 bits: 20 GB whole (network, reference, float32 gradients) and 31 GB shared out, where one process has 51.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

AVERAGES = SAMPLES, EXPORTED = "averages", "exported_averages"
"""Of the masters, whole in every process: what a method samples from, and what is exported. Files of a checkpoint."""
BUCKET = 2**26  # weights that travel at a time: 256 MiB


class Shards:
    """The parts, cut along the first dimension, of one process of the default group. Its methods are collective."""

    def __init__(self, names: list[str], masters: list[Tensor]):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.names, self.shapes = names, [m.shape for m in masters]
        self.mesh = init_device_mesh(masters[0].device.type, (dist.get_world_size(),))
        self.host = init_device_mesh("cpu", (dist.get_world_size(),))  # of what is saved and loaded
        self.buckets = [_Bucket(masters[part], part) for part in _cut([m.numel() for m in masters])]
        for bucket in self.buckets:
            module = fully_shard(bucket, mesh=self.mesh, reshard_after_forward=True)
            module.set_gradient_divide_factor(1.0)  # a sum: a slot's weight is in its loss
            module.set_unshard_in_backward(False)
        # plain tensors: the optimizer, clipping and the loss scaler need not know that they are parts
        self.own: list[Tensor] = [nn.Parameter(p.detach().to_local()) for b in self.buckets for p in b.masters]

    def gather(self, take: Callable[[int, Tensor], None]) -> None:
        """take(i, whole) for each master, which is there for that call only."""
        for bucket in self.buckets:
            bucket.token = bucket(take)

    def reduce_gradients(self, whole: Callable[[int], Tensor]) -> None:
        """whole(i): this process's gradient of master i. Its part of all processes' sum is added to own[i].grad."""
        for bucket in self.buckets:
            token = bucket(_ignore) if bucket.token is None else bucket.token
            bucket.gradients, bucket.token = whole, None
            token.backward()
            for own, p in zip(self.own[bucket.part], bucket.masters, strict=True):
                grad, p.grad = p.grad.to_local(), None
                own.grad = grad if own.grad is None else own.grad.add_(grad)

    def part(self, whole: Tensor) -> Tensor:
        """This process's rows, as fully_shard cuts them."""
        each = -(-len(whole) // self.mesh.size())
        return whole[each * self.mesh.get_local_rank() :][:each]

    def index(self, kind: str, name: str) -> int:
        """Which master a tensor of a checkpoint belongs to; an optimizer's begin with the number."""
        return int(name.split(".", 1)[0]) if kind == "optimizer" else self.names.index(name)

    def as_distributed(self, kind: str, name: str, part: Tensor) -> Tensor:
        """A part as what torch.distributed.checkpoint knows to be one; what is whole everywhere as it is."""
        from torch.distributed.tensor import DTensor, Shard

        part, i = part.cpu(), self.index(kind, name)
        if kind in AVERAGES or part.shape != self.own[i].shape:
            return part
        stride = torch.empty(self.shapes[i], device="meta").stride()
        return DTensor.from_local(part, self.host, [Shard(0)], run_check=False, shape=self.shapes[i], stride=stride)

    def save(self, directory: Path, tensors: dict[str, dict[str, Tensor]]) -> None:
        """Each process's parts as safetensors. An error of any process is raised by all."""
        from torch.distributed import checkpoint as dcp

        flat = {
            f"{kind}/{n}": self.as_distributed(kind, n, t) for kind, found in tensors.items() for n, t in found.items()
        }
        try:
            # not DCP's own format: its index is a pickle, and loading one runs code
            dcp.save(flat, storage_writer=dcp.HuggingFaceStorageWriter(str(directory), save_distributed=True))
        except dcp.api.CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from None


def load(directory: Path, kind: str, shards: Shards | None) -> dict[str, Tensor]:
    """The tensors of a kind that `Shards.save` left, from any number of processes: this process's parts, if it has
    parts, else whole."""
    from torch.distributed import checkpoint as dcp
    from torch.distributed.tensor import DTensor

    reader = dcp.HuggingFaceStorageReader(str(directory))
    found: dict[str, Tensor] = {}
    entries = reader.read_metadata().state_dict_metadata
    for key, entry in entries.items():
        group, name = key.split("/", 1)
        if group == kind and isinstance(entry, dcp.metadata.TensorStorageMetadata):
            tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
            if shards is not None and tensor.shape == shards.shapes[shards.index(kind, name)]:
                tensor = shards.as_distributed(kind, name, tensor if kind in AVERAGES else shards.part(tensor).clone())
            found[key] = tensor
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a single process loads is meant
        dcp.load(found, storage_reader=reader, no_dist=shards is None)
    return {
        key.split("/", 1)[1]: (value.to_local() if isinstance(value, DTensor) else value)
        for key, value in found.items()
    }


def _cut(sizes: list[int]) -> Iterator[slice]:
    """Consecutive masters of about BUCKET weights together."""
    start, total = 0, 0
    for i, size in enumerate(sizes):
        if i > start and total + size > BUCKET:
            yield slice(start, i)
            start, total = i, 0
        total += size
    yield slice(start, len(sizes))


def _ignore(index: int, whole: Tensor) -> None:
    pass


class _Bucket(nn.Module):
    """Masters that travel together: gathered by FSDP for the forward, their gradients dealt out after the backward."""

    def __init__(self, masters: list[Tensor], part: slice):
        super().__init__()
        self.masters = nn.ParameterList(nn.Parameter(m.detach().contiguous()) for m in masters)
        self.part = part
        self.token: Tensor | None = None  # whose backward hands the gradients in; of the forward that gathered last
        self.gradients: Callable[[int], Tensor] | None = None

    def forward(self, take: Callable[[int, Tensor], None]) -> Tensor:  # ()
        with torch.no_grad():
            for i, master in enumerate(self.masters, start=self.part.start):
                take(i, master)
        return _Handing.apply(self, *self.masters)


class _Context(FunctionCtx):
    bucket: _Bucket


class _Handing(torch.autograd.Function):
    """A zero whose gradient with respect to the masters is what the bucket was given."""

    @staticmethod
    def forward(ctx: _Context, bucket: _Bucket, *masters: Tensor) -> Tensor:
        ctx.bucket = bucket
        return masters[0].new_zeros(())

    @staticmethod
    def backward(ctx: _Context, _: Tensor) -> tuple[Tensor | None, ...]:
        bucket, gradients = ctx.bucket, ctx.bucket.gradients
        assert gradients is not None
        return None, *(gradients(i) for i in range(bucket.part.start, bucket.part.stop))
