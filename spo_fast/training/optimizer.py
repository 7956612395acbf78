"""AdamW on the float32 masters, and its state as flat tensors for a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spo_fast.config.optional_packages import missing_extra
from spo_fast.config.sections import AdamConfig


def flatten_optimizer(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state_dict -> tensors by "param.name" and the rest, which JSON can hold.

    bitsandbytes nests its quantised state one level deeper; it also loads the flat form, so the nesting is dropped.
    """
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for index, entries in state["state"].items():
        nested = {k: v for value in entries.values() if isinstance(value, dict) for k, v in value.items()}
        for name, value in {**entries, **nested}.items():
            if isinstance(value, Tensor):
                # a copy: bitsandbytes shares one table among all parameters, which safetensors refuses to write
                tensors[f"{index}.{name}"] = value.detach().to("cpu", copy=True).contiguous()
            elif not isinstance(value, dict):
                rest[f"{index}.{name}"] = value
    return tensors, {"entries": rest}


def unflatten_optimizer(
    tensors: dict[str, Tensor], rest: dict[str, Any], param_groups: list[dict[str, Any]]
) -> dict[str, Any]:
    """The inverse of `flatten_optimizer`, with the given parameter groups (this run's settings, not the saved ones)."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *rest["entries"].items()]:
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": param_groups}


def make_optimizer(parameters: list[Tensor], cfg: AdamConfig) -> torch.optim.Optimizer:
    """AdamW on the float32 masters, by torch or by bitsandbytes (8-bit state)."""
    settings: dict[str, Any] = {
        **{"lr": cfg.learning_rate, "betas": (cfg.adam_beta1, cfg.adam_beta2)},
        **{"weight_decay": cfg.adam_weight_decay, "eps": cfg.adam_epsilon},
    }
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **settings)
    try:
        import bitsandbytes
    except ImportError as error:
        raise ImportError(missing_extra("optimizer", cfg.optimizer)) from error
    kinds = {"adamw8bit": bitsandbytes.optim.AdamW8bit, "paged_adamw8bit": bitsandbytes.optim.PagedAdamW8bit}
    return kinds[cfg.optimizer](parameters, min_8bit_size=cfg.min_8bit_size, **settings)
