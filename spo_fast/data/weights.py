"""Files of weights, and networks filled from them: every tensor that a network has, no other, all finite.

The libraries' own loaders draw at random what a file lacks and pass over what it has too much, with a warning at most.
Networks come from the meta device, so that nothing is allocated or initialised that is about to be replaced.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from spo_fast.data.files import DAMAGED, read_safetensors, shown, some, weight_files

Network = TypeVar("Network", bound=nn.Module)

LINE = 280
"""Characters of an error, so that with a few words before it it is still a line to be read."""

# ---------------------------------------------------------------------------------------------------------------- files


def read_tensors(file: Path, inside: str | None = None) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, a pickle (.bin, .pt, .pth) of tensors alone, or an index of shards of either.

    inside: the entry of a pickled training state that holds the tensors, if it has one of that name.
    Raises ValueError for a pickle that holds more than tensors, a damaged file, or a name in two shards.
    """
    found: dict[str, Tensor] = {}
    for part in weight_files(file):
        tensors = read_safetensors(part) if part.suffix == ".safetensors" else _read_pickle(part, inside)
        if twice := sorted(found.keys() & tensors.keys()):
            raise ValueError(f"{shown(part)} holds what another shard holds too: {some(twice, 120)}. {DAMAGED}")
        found |= tensors
    return found


def _read_pickle(file: Path, inside: str | None) -> dict[str, Tensor]:
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except OSError:
        raise
    except Exception as error:  # whatever the unpickler makes of bytes that are no file of tensors
        raise ValueError(
            f"{file} cannot be read as a file of tensors alone. Pickles that hold anything else are refused, since "
            "loading one can run code: if you trust it, load it yourself and save its state dict as .safetensors."
        ) from error
    if inside is not None and isinstance(tensors, Mapping):
        tensors = tensors.get(inside, tensors)
    named = isinstance(tensors, Mapping) and all(
        isinstance(n, str) and isinstance(t, Tensor) for n, t in tensors.items()
    )
    if not named:
        raise ValueError(f"{file} holds no state dict (names to tensors): save the state dict alone.")
    return dict(tensors)


# ------------------------------------------------------------------------------------------------------------- networks


def fill(
    network: Network,  # on the meta device
    tensors: Mapping[str, Tensor],
    name: str | Path,  # what errors call the tensors: their file
    dtype: torch.dtype | None,  # None: names and shapes are checked alone, and the network stays on the meta device
    device: str | torch.device = "cpu",
    float32: Collection[str] = (),  # names that stay float32 whatever dtype is
    hint: str = DAMAGED,  # how to mend tensors that do not fit
) -> Network:
    """The network with these tensors in it, cast. Raises ValueError as check_fit, and for values that are not finite.

    `position_ids`, a constant that old files hold, is made and not read.
    """
    tensors = without_constants(tensors)
    check_fit(network, tensors, name, hint)
    if dtype is None:
        return network
    shapes = {key: value.shape for key, value in network.state_dict().items()}
    placed = {
        key: value.reshape(shapes[key]).to(device, torch.float32 if key in float32 else dtype)
        for key, value in tensors.items()
    }
    check_finite(placed, name, tensors)
    network.load_state_dict(placed, assign=True)
    for module in network.modules():
        for key, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta and device != "meta":
                if key != "position_ids":
                    raise NotImplementedError(f"{type(network).__name__} has a buffer {key} that no file fills")
                setattr(module, key, torch.arange(buffer.shape[-1], device=device).expand(buffer.shape).clone())
    return network


def without_constants(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the position ids that old files hold."""
    return {key: value for key, value in tensors.items() if not key.endswith("position_ids")}


def misfits(network: nn.Module, tensors: Mapping[str, Tensor]) -> list[tuple[str, list[str]]]:
    """(what is wrong, names) of tensors that are missing, unexpected, misshapen or no floating-point numbers."""
    wanted = {key: value.shape for key, value in network.state_dict().items()}
    shared = sorted(wanted.keys() & tensors.keys())
    found = [
        ("missing", sorted(wanted.keys() - tensors.keys())),
        ("unexpected", sorted(tensors.keys() - wanted.keys())),
        (
            "of the wrong shape",
            [
                f"{key} {_sizes(tensors[key].shape)}, not {_sizes(wanted[key])}"
                for key in shared
                if squeezed(tensors[key].shape) != squeezed(wanted[key])
            ],
        ),
        ("quantised", [key for key in shared if not tensors[key].is_floating_point()]),
    ]
    return [(what, names) for what, names in found if names]


def squeezed(shape: Sequence[int]) -> tuple[int, ...]:
    """A 1x1 convolution's shape as that of the linear layer that it is, which stands for it in some files."""
    sizes = tuple(shape)
    while len(sizes) > 2 and sizes[-1] == 1:
        sizes = sizes[:-1]
    return () if sizes == (1,) else sizes


def _sizes(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def check_fit(network: nn.Module, tensors: Mapping[str, Tensor], name: str | Path, hint: str = DAMAGED) -> None:
    """Raise a ValueError of one line that names every kind of mismatch between a network and a file's tensors."""
    if found := misfits(network, tensors):
        head = f"{shown(name)} does not fit the network of {len(network.state_dict())} tensors: "
        kinds = [f"{len(names)} {what}" for what, names in found]
        room = (LINE - len(head) - len(hint) - sum(len(kind) + 4 for kind in kinds)) // len(found)
        told = [f"{kind}: {some(names, room)}" for kind, (_, names) in zip(kinds, found, strict=True)]
        raise ValueError(f"{head}{'; '.join(told)}. {hint}")


def check_finite(tensors: Mapping[str, Tensor], name: str | Path, before: Mapping[str, Tensor] | None = None) -> None:
    """Raise a ValueError that names tensors with a NaN or an infinity. before: the same before they were cast."""
    kept = {key: value for key, value in tensors.items() if value.numel() and not value.is_meta}
    if not kept:
        return
    # one pass, a tenth of what isfinite().all() takes, and one wait for the device
    ends = torch.stack([torch.stack(torch.aminmax(value)).double() for value in kept.values()])
    if not (bad := [key for key, sound in zip(kept, ends.isfinite().all(1).tolist(), strict=True) if not sound]):
        return
    sound_before = [key for key in bad if before and bool(before[key].double().isfinite().all())]
    if sound_before:
        bad = sound_before
        dtype = str(kept[bad[0]].dtype).removeprefix("torch.")
        why, mend = f"values beyond {dtype}'s range", "Use bf16 or no (--mixed_precision, --scorer_dtype)."
    else:
        why, mend = "values that are not finite (NaN or infinity)", DAMAGED
    head = f"{shown(name)} holds {why} in {len(bad)} of its {len(tensors)} tensors: "
    raise ValueError(f"{head}{some(bad, LINE - len(head) - len(mend))}. {mend}")


def renamed(tensors: Mapping[str, Tensor], rename: Callable[[str], str], name: str | Path) -> dict[str, Tensor]:
    """The tensors under other names. Raises ValueError if two get the same: a file that holds both ways of naming."""
    found: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if (new := rename(key)) in found:
            raise ValueError(f"{shown(name)} holds {new} under two names, such as {some([key], 90)}. {DAMAGED}")
        found[new] = value
    return found
