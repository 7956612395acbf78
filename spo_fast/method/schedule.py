"""A schedule is a table. Every sampler step is a row: mean = a x_t + b m, x0 = c x_t + d m, std.

m is the network's raw (guided) output. DDIM with epsilon, v or sample prediction and the samplers of flow matching
(flow_schedule.py) differ only in their rows, so one set of kernels serves all of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

PREDICTIONS = ("epsilon", "v_prediction", "sample")  # what a network's output may mean


@dataclass(frozen=True)
class StepTable:
    """One row a denoising step, noisiest first. Only the last ones' std may be 0 (if eta is not)."""

    timesteps: Tensor  # (R,) what the network is told: int64 of a diffusion, float32 of a flow (1000 sigma)
    coefficients: Tensor  # (R, 5) float64: a, b, c, d, std
    signal: Tensor  # (R,) float64: x_t = signal x0 + noise e; of a diffusion sqrt(alphabar), of a flow 1 - sigma
    noise: Tensor  # (R,) float64: sqrt(1 - alphabar), or sigma
    judged_at: Tensor  # (R,) int64 timesteps of a diffusion, 0..999: what scorers are told

    @property
    def num_steps(self) -> int:
        """R, the rows."""
        return self.timesteps.shape[0]

    def to(self, device: torch.device | str) -> StepTable:
        """The same rows on a device, still in float64."""
        return StepTable(*(getattr(self, field.name).to(device) for field in fields(self)))


def ddim_table(
    alphas_cumprod: Tensor,  # (T,) the scheduler's own float32 table
    timesteps: Tensor,  # (R,) int64, descending
    eta: float,
    prediction_type: str,
    final_alpha: Tensor | None = None,  # () alphabar beyond t = 0; None: alphas_cumprod[0]
) -> StepTable:
    """DDIM (arXiv 2010.02502, eq. 12 and 16): each row goes to the next row's timestep, which the network is told then.

    ddim_with_logprob.py of the published code and diffusers' DDIMScheduler.step go to t - T // R instead. That is the
    next timestep too with leading spacing (their runs are matched to the last digit) and wherever R divides T; with
    linspace spacing, or trailing and R = 30, it is not, so it is followed in the last row only, which has no next one:
    to alphas_cumprod[t - T // R], or final_alpha if that is below 0. The published code has alphas_cumprod[0] there.
    The table is cast to float64 before any arithmetic: from float64 betas the published std would be missed by 3e-7.

    std is 0 with eta = 0, and in a last row that starts at t = 0 or ends at alphabar 1: fine for sampling, useless for
    log-probabilities. Raises ValueError for an unknown prediction type, eta outside [0, 1], timesteps that do not fall
    within [0, T), and an epsilon predicted where alphabar is 0, which leaves x0 open.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta} must lie in [0, 1]")
    if prediction_type not in PREDICTIONS:
        raise ValueError(f"prediction_type={prediction_type!r} is unknown. Known: {', '.join(PREDICTIONS)}.")
    T, R = len(alphas_cumprod), len(timesteps)
    last = int(timesteps[-1])
    if not (timesteps[0] < T and last >= 0 and bool((timesteps.diff() < 0).all())):
        raise ValueError(f"timesteps {timesteps.tolist()!s:.80} must fall, and lie within 0 to {T - 1}.")
    alphas = alphas_cumprod.double()
    beyond = alphas[0] if final_alpha is None else final_alpha.double()
    alpha = alphas[timesteps]
    alpha_prev = torch.cat([alpha[1:], (alphas[last - T // R] if last >= T // R else beyond).view(1)])
    if prediction_type == "epsilon" and (alpha == 0).any():
        raise ValueError("the noise schedule ends without signal (alphabar 0), where epsilon says nothing of x0.")
    std = eta * ((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)).sqrt()

    # x0 = c x_t + d m and epsilon = e x_t + f m for the three meanings of m
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    signal, sigma = alpha.sqrt(), (1 - alpha).sqrt()
    conversions = {
        "epsilon": (1 / signal, -sigma / signal, zero, one),
        "v_prediction": (signal, -sigma, sigma, signal),
        "sample": (zero, one, 1 / sigma, -signal / sigma),
    }
    c, d, e, f = conversions[prediction_type]
    towards_x0, towards_noise = alpha_prev.sqrt(), (1 - alpha_prev - std**2).clamp_min(0).sqrt()
    a = towards_x0 * c + towards_noise * e
    b = towards_x0 * d + towards_noise * f
    return StepTable(timesteps, torch.stack([a, b, c, d, std], dim=1), signal, sigma, timesteps)


def full_table(alphas_cumprod: Tensor, prediction_type: str) -> StepTable:
    """DDIM rows of all T timesteps (eta = 0), T-1 first: row T-1-t is timestep t."""
    return ddim_table(alphas_cumprod, torch.arange(len(alphas_cumprod) - 1, -1, -1), 0.0, prediction_type)


# ---------------------------------------------------------------------------------------------------- a model's files

NUM_TIMESTEPS = 1000
# what a scheduler that has no such setting does, and what the published ones of SD-1.5 and SDXL have written down
PUBLISHED = {"prediction_type": "epsilon", "clip_sample": False, "thresholding": False, "set_alpha_to_one": False}
# diffusers shows the arguments of these only where scipy and torchsde are installed
HIDDEN = dict.fromkeys(("LMSDiscreteScheduler", "DPMSolverSDEScheduler"), {"timestep_spacing": "linspace"})
# of a process, or a network that is told or predicts something else
ANOTHER: dict[str, list[object]] = {
    "use_flow_sigmas": [True],
    "timestep_type": ["continuous"],
    "variance_type": ["learned", "learned_range"],
}
NOT_DONE = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")


def ddim_scheduler(config: Mapping[str, object]) -> DDIMScheduler:
    """diffusers' DDIMScheduler on the noise schedule of a scheduler_config.json, whichever sampler that names.

    What the file leaves out has the default of the class it names, as the model's own pipeline reads it (Euler's
    spacing is linspace, DDIM clips). Raises ValueError for a schedule that is not trained here.
    """
    import diffusers
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    name = str(config.get("_class_name"))
    if not ({"beta_start", "beta_end"} <= config.keys() or config.get("trained_betas")):
        raise ValueError(
            f"the model's scheduler ({name}) has no betas: the model belongs to another noise "
            "schedule than the discrete one of SD-1.5 and SDXL, which is the only one that is trained here."
        )
    own = inspect.signature(getattr(diffusers, name, DDIMScheduler).__init__).parameters
    known = [key for key in inspect.signature(DDIMScheduler.__init__).parameters if key != "self"]
    settings = PUBLISHED | HIDDEN.get(name, {}) | {key: own[key].default for key in known if key in own}
    settings |= {key: config[key] for key in known if key in config}
    where = f"the model's scheduler ({name})"
    for key in ("clip_sample", "thresholding"):
        if settings[key]:
            raise ValueError(
                f"{where} has {key}=true{'' if key in config else ' by default'}: its steps are not Gaussian in x_t, "
                f"have no log-probability. Set {key} to false in its scheduler_config.json if the model allows it."
            )
    prediction_type = settings["prediction_type"]
    odd = [key for key, values in ANOTHER.items() if config.get(key) in values]
    if odd or prediction_type not in PREDICTIONS:
        what = f"{odd[0]}={config[odd[0]]}" if odd else f"prediction_type={prediction_type!r:.40}"
        raise ValueError(f"{where} has {what}. Only {', '.join(PREDICTIONS)} of a diffusion are trained here.")
    try:
        scheduler: DDIMScheduler = DDIMScheduler(**settings)
        scheduler.set_timesteps(2)  # looks at spacing and offset
    except (NotImplementedError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{where} is damaged or of another kind: {' '.join(str(error).split()):.150}.") from error
    alphas, T = scheduler.alphas_cumprod, scheduler.config["num_train_timesteps"]
    if T != NUM_TIMESTEPS or alphas.shape != (T,):
        raise ValueError(
            f"{where} counts {T} timesteps, {alphas.numel()} betas. SD-1.5, SDXL and the scorers that are told the "
            f"timestep count {NUM_TIMESTEPS}; nothing else is trained here."
        )
    if not (alphas[0] < 1 and alphas[-1] >= 0 and bool((alphas.diff() < 0).all())):
        raise ValueError(f"{where} has betas that are not between 0 and 1: a timestep of it would add no noise or NaN.")
    if alphas[-1] == 0 and prediction_type == "epsilon":
        raise ValueError(
            f"{where} has no signal left at its last timestep (rescale_betas_zero_snr), where epsilon says nothing of "
            "x0. Such models predict v: set prediction_type to v_prediction if this one does."
        )
    return scheduler


def schedule_notes(config: Mapping[str, object]) -> list[str]:
    """What a scheduler_config.json asks for that is done otherwise here, a line each."""
    name, dropped = config.get("_class_name"), [key for key in NOT_DONE if config.get(key)]
    notes = [f"the model's scheduler ({name}) has {', '.join(dropped)}: not done here"] if dropped else []
    if name in ("LCMScheduler", "TCDScheduler"):
        notes.append(f"the model's scheduler ({name}) is that of a distilled model, whose few steps are not DDIM's")
    return [f"{note}; pictures and training take DDIM's steps" for note in notes]


def table_of(scheduler: DDIMScheduler, num_steps: int, eta: float) -> StepTable:
    """`ddim_table` of a DDIMScheduler with its own spacing. Raises ValueError for steps that its settings do not allow.

    set_alpha_to_one holds as in diffusers: the last step then ends at x0 and adds no noise. (The published code ignores
    it, and both published models have it off.)
    """
    scheduler.set_timesteps(num_steps)
    timesteps = scheduler.timesteps[:num_steps]  # of 61 trailing ones diffusers makes 62, the last of them -1
    T, first, last = len(scheduler.alphas_cumprod), int(timesteps[0]), int(timesteps[-1])
    if not 0 < first < T or last < 0:
        spacing, offset = scheduler.config["timestep_spacing"], scheduler.config["steps_offset"]
        raise ValueError(
            f"num_steps={num_steps} with the model's timestep_spacing={spacing} and "
            f"steps_offset={offset} goes from t = {first} to {last}: it must begin within 1 to {T - 1}. "
            "Use another --num_steps, or mend scheduler/scheduler_config.json."
        )
    alphas, final = scheduler.alphas_cumprod, scheduler.final_alpha_cumprod
    return ddim_table(alphas, timesteps, eta, scheduler.config["prediction_type"], final)
