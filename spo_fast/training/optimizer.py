"""The optimizer on the float32 masters with its schedule, and its state as flat tensors for a checkpoint."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from spo_fast.config.optional_packages import missing_extra
from spo_fast.config.sections import AdamConfig
from spo_fast.models.trained_weights import TrainedWeights
from spo_fast.training.step_sizes import StepSizes


def flatten_optimizer(state: Mapping[str, object]) -> tuple[dict[str, Tensor], dict[str, object]]:
    """An optimizer's state_dict -> tensors by "param.name" and the rest, which JSON can hold.

    bitsandbytes nests its quantised state one level deeper; it also loads the flat form, so the nesting is dropped.
    """
    tensors: dict[str, Tensor] = {}
    rest, moments = {}, state["state"]
    assert isinstance(moments, dict)
    for index, entries in moments.items():
        nested = {k: v for value in entries.values() if isinstance(value, dict) for k, v in value.items()}
        for name, value in {**entries, **nested}.items():
            if isinstance(value, Tensor):
                # a copy: bitsandbytes shares one table among all parameters, which safetensors refuses to write
                tensors[f"{index}.{name}"] = value.detach().to("cpu", copy=True).contiguous()
            elif not isinstance(value, dict):
                rest[f"{index}.{name}"] = value
    groups = state["param_groups"]
    assert isinstance(groups, list)
    own = {name: groups[0][name] for name in FOUND if name in groups[0]}
    return tensors, {"entries": rest, **({"group": own} if own else {})}


FOUND = ("k", "d", "d_max", "d_hat", "d_numerator", "d_denom", "weight_sum", "lr_max", "scheduled_lr")
"""Of a parameter group what an optimizer found itself (Prodigy, schedule-free AdamW), numbers that a resume needs."""


def unflatten_optimizer(
    tensors: Mapping[str, Tensor],
    rest: Mapping[str, Mapping[str, object]],
    param_groups: Sequence[Mapping[str, object]],
) -> dict[str, object]:
    """The inverse of `flatten_optimizer`, with the given parameter groups (this run's settings, not the saved ones)."""
    state: dict[int, dict[str, object]] = {}
    for key, value in [*tensors.items(), *rest["entries"].items()]:
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": [{**group, **rest.get("group", {})} for group in param_groups]}


KINDS = {  # by the value of --optimizer: module, class, arguments of its own
    "adamw": ("torch.optim", "AdamW", lambda cfg: {}),
    "adamw8bit": ("bitsandbytes.optim", "AdamW8bit", lambda cfg: {"min_8bit_size": cfg.min_8bit_size}),
    "paged_adamw8bit": ("bitsandbytes.optim", "PagedAdamW8bit", lambda cfg: {"min_8bit_size": cfg.min_8bit_size}),
    "prodigy": ("prodigyopt", "Prodigy", lambda cfg: {"safeguard_warmup": cfg.lr_warmup_steps > 0}),
    "schedulefree": ("schedulefree", "AdamWScheduleFree", lambda cfg: {"warmup_steps": cfg.lr_warmup_steps}),
}


def make_optimizer(parameters: list[Tensor], cfg: AdamConfig) -> torch.optim.Optimizer:
    """On the float32 masters. Raises ImportError for one whose package is not there."""
    module, name, own = KINDS[cfg.optimizer]
    try:
        kind = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ImportError(missing_extra("optimizer", cfg.optimizer)) from error
    settings = dict(betas=(cfg.adam_beta1, cfg.adam_beta2), weight_decay=cfg.adam_weight_decay, eps=cfg.adam_epsilon)
    with contextlib.redirect_stdout(None):  # Prodigy says that its decay is decoupled
        made: torch.optim.Optimizer = kind(parameters, lr=cfg.learning_rate, **settings, **own(cfg))
    return made


@torch.no_grad()
def averaged(optimizer: torch.optim.Optimizer) -> list[Tensor] | None:
    """Schedule-free weights that are to be used, x, where the masters are y, at which gradients are taken; None of
    other optimizers. Its own eval() and train() go there and back, but not to the same last bit."""
    if not hasattr(optimizer, "eval"):
        return None
    masters = optimizer.param_groups[0]["params"]
    y = [p.detach().clone() for p in masters]
    optimizer.eval()
    x = [p.detach().clone() for p in masters]
    optimizer.train()  # type: ignore[attr-defined]
    for p, value in zip(masters, y, strict=True):
        p.copy_(value)
    return x


class WeightUpdates:
    """What changes trained weights, whatever the gradients come from, and what a checkpoint keeps of it."""

    def __init__(
        self,
        weights: TrainedWeights,
        cfg: AdamConfig,
        schedule: str | Callable[[int], float],  # one of diffusers', or step -> factor of the learning rate
        total: int,  # its steps
    ):
        from diffusers.optimization import get_scheduler

        self.policy, self.optim = weights, cfg
        # a list, not a filter object: AdamW would exhaust an iterator and clipping would see nothing
        self.parameters: list[Tensor] = list(weights.masters)
        self.optimizer = make_optimizer(self.parameters, cfg)
        if hasattr(self.optimizer, "train"):
            self.optimizer.train()
            weights.finished = functools.partial(averaged, self.optimizer)
        if callable(schedule):
            self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, schedule)
        else:
            self.scheduler = get_scheduler(schedule, self.optimizer, None, cfg.lr_warmup_steps, total)
        self.sizes = StepSizes(weights, cfg)
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)  # bf16 and float32 need none

    @property
    def lr(self) -> float:
        """The next step's; of Prodigy that which it has found, its d times the factor that was given."""
        group = self.optimizer.param_groups[0]
        return float(group["lr"] * group.get("d", 1.0))

    def go_to(self, step: int) -> None:
        """Put the learning rate where this run's schedule has it at `step`."""
        self.scheduler.last_epoch = step
        for group, base, factor in zip(
            self.optimizer.param_groups, self.scheduler.base_lrs, self.scheduler.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(step)

    def gradient_norm(self) -> Tensor:  # ()
        """Of all gradients that are there, or of this process's parts. Nothing is read from the device."""
        return torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])

    def clip(self, norm: Tensor) -> None:
        """Bring gradients of this norm down to max_grad_norm."""
        if self.optim.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.optim.max_grad_norm, norm)

    def check_weights(self) -> None:
        """Raises RunError if the last optimizer step broke the weights. Waits for the device."""
        self.sizes.look(float(self.policy.size()))
