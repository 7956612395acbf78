"""The guided step (one UNet call on both halves, then K children) captured in a CUDA graph and replayed.

Latents, timestep, row and noise keys are device tensors that are refilled before each replay; what is checked is that
a replay computes what an eager call on the same inputs does, that new keys give new noise and old keys the old noise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import networks
from benchmarks.records import Records
from benchmarks.shapes import iteration_config, latent_shape
from benchmarks.timing import capture, measure, relative_error
from spo_fast.method.schedule import ddim_table
from spo_fast.models.policy import Policy
from spo_fast.ops.transition import transition

PROMPTS, CHILDREN = 2, 4


class GuidedStep:
    """A step on fixed storage: `fill` the inputs, then call."""

    def __init__(self, kind: str, size: str, device: str, dtype: torch.dtype):
        cfg = iteration_config(kind, size, PROMPTS, "no")
        self.guidance = cfg.sample.guidance_scale
        self.policy = Policy(networks.make_unet(kind, size, device, dtype), cfg.adapter, seed=0)
        shapes = {name: master.shape for name, master in self.policy.state_dict().items()}
        self.policy.load_state_dict(networks.lora_weights(shapes))
        scheduler = networks.ddim_scheduler(kind, cfg.sample.num_steps)
        self.table = ddim_table(scheduler.alphas_cumprod, scheduler.timesteps, 1.0, "epsilon").to(device)
        self.cond = networks.conditioning(kind, size, PROMPTS, device, dtype)
        latent = latent_shape(kind, size)
        self.x = torch.empty(PROMPTS, *latent, device=device)
        self.t = torch.zeros((), dtype=torch.int64, device=device)
        self.rows = torch.zeros(PROMPTS, dtype=torch.int64, device=device)
        self.keys = torch.zeros(PROMPTS, 5, dtype=torch.int64, device=device)

    def fill(self, x_seed: int, row: int, key: int) -> None:
        generator = torch.Generator().manual_seed(x_seed)
        self.x.copy_(torch.randn(self.x.shape, generator=generator))
        self.rows.fill_(row)
        self.t.copy_(self.table.timesteps[row])
        self.keys.fill_(key)
        self.keys[:, 2] = torch.arange(PROMPTS, device=self.keys.device)  # the prompt's index

    @torch.no_grad()
    def __call__(self) -> tuple[Tensor, Tensor]:  # x0 (B, C, H, W), children (K, B, C, H, W)
        m = self.policy.predict(self.x, self.t, self.cond, guided=True)
        return transition(
            *m, self.x, self.rows, self.table.coefficients, self.guidance, num_children=CHILDREN, keys=self.keys
        )


def check_replays(step: GuidedStep, replay: Callable[[], Any]) -> dict[str, Any]:
    """Facts of three replays with changed inputs, a fourth that repeats the first, and one whose keys alone differ."""
    fills = [(0, 2, 10), (1, 4, 11), (2, 5, 12)]
    errors, bitwise, first = [], True, None
    for fill in fills:
        step.fill(*fill)
        expected = [v.clone() for v in step()]
        got = [v.clone() for v in replay()]
        errors.append(relative_error(got, expected))
        bitwise &= all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))
        first = got if first is None else first
    assert first is not None
    step.fill(*fills[0])
    again = [v.clone() for v in replay()]
    step.keys[:, 1] += 1  # the next iteration's keys
    fresh = [v.clone() for v in replay()]
    return {
        "max_error": max(errors),
        "bitwise_equal_to_eager": bitwise,
        "same_keys_same_noise": all(torch.equal(a, b) for a, b in zip(first, again, strict=True)),
        "new_keys_new_noise": not torch.equal(fresh[1], again[1]),
        "x0_ignores_keys": torch.equal(fresh[0], again[0]),
    }


def check_step(kind: str, size: str, device: str, dtype: torch.dtype) -> dict[str, Any]:
    step = GuidedStep(kind, size, device, dtype)
    step.fill(0, 2, 1)
    if device != "cuda":
        return check_replays(step, step) | {"captured": False}
    again, outputs = capture(step)

    def replay() -> Any:
        again()
        return outputs

    facts = check_replays(step, replay) | {"captured": True}
    facts |= measure(step, device)
    facts |= {f"graph_{name}": value for name, value in measure(replay, device).items()}
    return facts


def run(records: Records, size: str, device: str) -> None:
    plan = [("sd15", "tiny", torch.float32), ("sdxl", "tiny", torch.float32), ("sdxl", "tiny", torch.bfloat16)]
    if size == "full":
        plan += [("sd15", "full", torch.float32), ("sd15", "full", torch.bfloat16), ("sd15", "full", torch.float16)]
    for kind, at, dtype in plan:
        name = f"guided step {kind} {at}"
        try:
            facts = check_step(kind, at, device, dtype)
            # equal bits are expected; cuDNN and cuBLAS may pick other kernels while capturing, within rounding
            limit = {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
            sound = facts["max_error"] <= limit and facts["same_keys_same_noise"] and facts["new_keys_new_noise"]
            records.write(name, "ok" if sound else "failed", dtype=str(dtype)[6:], **facts)
        except Exception as error:
            records.failed(name, error, dtype=str(dtype)[6:])
