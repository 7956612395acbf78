"""torch.compile of a network's repeated blocks, or of all of it, with no new shape after the first iteration.

No graph break is allowed (fullgraph) and no size is dynamic: a graph belongs to one batch size, so Policy pads what it
is given to the run's few batch sizes. Regional compilation is the default on a GPU: blocks of one shape share a graph,
which takes a tenth of the time for the same speed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor, fx, nn

Backend = Callable[[fx.GraphModule, list[Tensor]], Callable[..., object]]
"""What torch.compile hands a graph and its inputs."""
FLOW_BLOCKS: tuple[type[nn.Module], ...] = (JointTransformerBlock, FluxTransformerBlock, FluxSingleTransformerBlock)
BLOCKS: tuple[type[nn.Module], ...] = (BasicTransformerBlock, ResnetBlock2D, *FLOW_BLOCKS)
GRAPHS = 256
"""Of one function: shapes x batch sizes x (with and without gradient, with and without LoRA). PyTorch stops at 8."""


def compile_network(
    network: nn.Module,
    how: str,
    blocks: tuple[type[nn.Module], ...] = BLOCKS,
    backend: str | Backend = "inductor",
    sizes: Sequence[int] = (),
) -> None:
    """how: regional (each of the network's blocks) or full; in place, compiled at the first call.

    sizes: rising; batches of a network without gradient are filled up to the next of them.
    """
    from torch import _dynamo as dynamo

    dynamo.config.recompile_limit = dynamo.config.accumulated_recompile_limit = GRAPHS
    parts = [network] if how == "full" else [m for m in network.modules() if isinstance(m, blocks)]
    for part in parts:
        part.forward = torch.compile(part.forward, fullgraph=True, dynamic=False, backend=backend)
    if sizes:
        network.forward = filled_up(network.forward, sizes)


def filled_up(function: Callable[..., Tensor], sizes: Sequence[int]) -> Callable[..., Tensor]:
    """A function of a batch whose first argument is filled up, with its first row, to the next of the sizes."""

    def call(x: Tensor, *rest: object) -> Tensor:
        size = next((size for size in sizes if size >= len(x)), len(x))
        if size == len(x):
            return function(x, *rest)
        return function(torch.cat([x, x[:1].expand(size - len(x), *x.shape[1:])]), *rest)[: len(x)]

    return call


def keep_cache(otherwise: Path) -> Path:
    """Inductor's and its Triton kernels' cache, which PyTorch has in /tmp, goes where the next run of this user finds
    it: TORCHINDUCTOR_CACHE_DIR, else spo_fast/compile in XDG_CACHE_HOME (~/.cache), else, if that cannot be written,
    compile_cache in this directory. Returns the one.
    """
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        found = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "spo_fast" / "compile"
        try:
            found.mkdir(parents=True, exist_ok=True)
            if not os.access(found, os.W_OK):
                raise PermissionError
        except (OSError, RuntimeError):  # RuntimeError: a user without a home
            found = otherwise.resolve() / "compile_cache"
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(found)
    return Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
