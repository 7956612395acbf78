"""What a run chooses by itself for the device it finds, each choice with its reason and the flag that overrides it.

Only settings that leave the maths alone are chosen: precision if it was left open, and how much is done at once; and,
if the model's noise schedule ends in a step without noise, that training ends before it.
Batches stay whole while the predicted peak (fake_run.py) leaves room, then they are halved until they fit; norms, then
all activations, are recomputed only when no batch fits without. CUDA graphs, which keep a micro-batch's memory, come
where that leaves room for them. The run's saved settings hold what was chosen.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from spo_fast.config.methods import find_method
from spo_fast.config.training import DECIDES, LEAST, Config
from spo_fast.data.prompt_order import training_prompts
from spo_fast.models.device import (
    COMPILE_S,
    GIB,
    Choice,
    Device,
    compile_pays,
    found_device,
    how_computed,
    network_width,
    peak_tflops,
)
from spo_fast.models.files.sources import Resolved
from spo_fast.training.plan.costs import Costs
from spo_fast.training.plan.counted import predict
from spo_fast.training.processes import world_size

HALF = 0.5  # of the pairs kept: not known before the run
MANY = 1000  # iterations on pairs whose number is not known before they are opened


def with_trained_steps(cfg: Config, resolved: Resolved | None) -> tuple[Config, list[Choice]]:
    """cfg with the steps that are trained, as the model's schedule has them. Raises ValueError if there are none."""
    method = find_method(cfg.objective.method)
    if method.on_pairs:
        return cfg, []
    if not method.transitions:  # any level of noise can be trained
        return cfg.with_fields(branch_start=cfg.sample.first_branch), []
    if resolved is None and cfg.sample.branch_start is not None:
        return cfg, []  # nothing is open, and no file says more
    from spo_fast.models.unasked import import_networks

    import_networks()
    from spo_fast.method.rollout import trained_steps  # its ops import Triton, and that the compiler
    from spo_fast.models.flow import sampled_table

    table, sample, choices = sampled_table(cfg, resolved), cfg.sample, []
    first, end = trained_steps(sample, table)
    if sample.branch_start is None:
        sigma = float(table.noise[first] / (table.signal[first] + table.noise[first]))
        why = f"the first step whose sigma, {sigma:.3g}, is at most that of SPO's t = 751"
        if sample.branch_sigma is not None:
            why = f"the first step whose sigma, {sigma:.3g}, is at most {sample.branch_sigma:g}"
        choices.append(Choice("branch_start", first, why))
    if end < sample.last_branch:
        at = float(table.timesteps[-1])
        why = f"on the model's schedule the last step, from t = {at:.3g}, adds no noise: no log-probability to train"
        if table.timesteps.is_floating_point():
            why = "the last step adds no noise, the one before hardly any: rounding would be most of their log-ratios"
        choices.append(Choice("branch_end", end, why))
    found = {choice.flag: choice.value for choice in choices}
    return cfg.with_fields(**found, **({"branch_sigma": None} if "branch_start" in found else {})), choices


def choose(cfg: Config, device: Device, resolved: Resolved | None = None) -> tuple[Config, list[Choice]]:
    """cfg with every open setting filled in, and why. Settings that were given are not touched.

    Raises ValueError for one that the device cannot do.
    """
    cfg, choices = with_trained_steps(cfg, resolved)
    width = network_width(resolved, cfg.model.model)
    cfg, computed = how_computed(cfg, device, lambda cfg: _compile_pays(cfg, device, resolved), width)
    choices += computed

    def take(flag: str, value: int | bool, reason: str) -> None:
        nonlocal cfg
        cfg = cfg.with_fields(**{flag: value})
        choices.append(Choice(flag, value, reason))

    if cfg.engine.memory is not None and cfg.optim.gradient_checkpointing is None:
        take("gradient_checkpointing", cfg.engine.memory == "small", f"memory={cfg.engine.memory}")
    open_settings = [flag for flag in DECIDES if cfg.flat()[flag] is None]
    if not open_settings:
        return cfg, choices
    whole: dict[str, int | bool | str] = {
        "rows_per_forward": cfg.sample.rows_of_a_step,
        "decode_chunk": min(cfg.model.images_per_decode, cfg.sample.num_candidates * cfg.sample.sample_batch_size),
        "states_per_forward": cfg.optim.states_at_once,
        "cuda_graphs": device.type == "cuda" and len(cfg.data.sizes) < 2,
        "memory": "fast",
        "gradient_checkpointing": False,
    }
    cfg = cfg.with_fields(**{flag: whole[flag] for flag in open_settings})
    if device.usable_bytes is None:
        reasons = {"cuda_graphs": "a CPU has none"}
        choices += [Choice(f, whole[f], reasons.get(f, "memory is not planned on a CPU")) for f in open_settings]
        return cfg, choices
    costs = _memoised(resolved, device)
    cfg = _fit(cfg, set(open_settings), costs, device.usable_bytes)
    flat = cfg.flat()
    for flag in open_settings:
        peak = peak_of(flag, costs(cfg))
        how = "all at once" if flat[flag] == whole[flag] else f"halved from {whole[flag]} until it fitted"
        if flag == "cuda_graphs":
            how = "what they keep fits beside an optimizer step" if flat[flag] else "the step needs their memory"
            how = how if len(cfg.data.sizes) < 2 else "each of several sizes would keep its own"
        if flag in ("memory", "gradient_checkpointing"):
            how = "nothing computed twice" if flat[flag] == whole[flag] else "needed to fit"
        room = f"{' and '.join(DECIDES[flag])}: {peak / GIB:.1f} of {device.usable_bytes / GIB:.1f} GiB predicted"
        if unknown := costs(cfg).unknown:
            room += f", without {', '.join(unknown)}, whose memory is not known"
        choices.append(Choice(flag, flat[flag], f"{how} ({room})"))
    return cfg, choices


def _compile_pays(cfg: Config, device: Device, resolved: Resolved | None) -> tuple[bool, str]:
    """Of the whole run, so that a resumed one chooses alike."""
    compares = find_method(cfg.objective.method).compares
    cfg = cfg.with_fields(fuse=True)  # as it will be: predict keeps the networks of its last settings
    flops = sum(predict(cfg, resolved, device.type).flops(HALF if compares else 1.0).values()) * iterations(cfg)
    return compile_pays(flops, peak_tflops(device.name), COMPILE_S)


def iterations(cfg: Config) -> int:
    """Of the run, or, of pairs that are not opened yet, what --max_train_steps says; else MANY."""
    if find_method(cfg.objective.method).on_pairs:
        return cfg.run.max_train_steps or MANY
    return cfg.run.iterations(training_prompts(cfg, world_size())[1].iterations_per_epoch)


def choose_for(device: torch.device, cfg: Config, resolved: Resolved) -> tuple[Config, list[Choice], Device]:
    """`choose` for a device that is here, and what was found of it."""
    found = found_device(device)
    if found.memory_bytes is not None:
        print("predicting what fits into memory ...", flush=True)
    return *choose(cfg, found, resolved), found


def peak_of(flag: str, costs: Costs) -> int:
    """Bytes: the highest peak of the phases whose memory the setting decides; of a batch size, by itself, and of the
    step if its phase is what fills the graphs' pool."""
    peaks, phases = costs.peaks if flag == "cuda_graphs" else costs.own_peaks, DECIDES[flag]
    found = [peaks[phase] for phase in phases if phase in peaks]
    if costs.graphs and max(costs.replayed, key=lambda phase: costs.replayed[phase]) in phases:
        found.append(costs.peaks["step"])
    return max(found, default=0)


def _fit(cfg: Config, may: set[str], costs: Callable[[Config], Costs], usable: int) -> Config:
    """Halve what may be halved until the phases it decides fit, or it is as small as it can be; then compute twice."""

    def halved(cfg: Config, flag: str) -> Config:
        value = cfg.flat()[flag]
        while flag in may and value > LEAST[flag] and peak_of(flag, costs(cfg)) > usable:
            value = max(LEAST[flag], value // 2)
            cfg = cfg.with_fields(**{flag: value})
        return cfg

    if "cuda_graphs" in may:  # networks that fill a card hide their launches: whole batches come first (not measured)
        cfg = cfg.with_fields(cuda_graphs=False)
    cfg = halved(halved(cfg, "rows_per_forward"), "decode_chunk")
    ladder: list[dict[str, str | bool]] = [{"memory": "balanced"}] if "memory" in may and cfg.engine.fuse else []
    if "gradient_checkpointing" in may:
        ladder.append({"gradient_checkpointing": True} | ({"memory": "small"} if "memory" in may else {}))
    for settings in ({}, *ladder):
        tried = halved(cfg.with_fields(**settings), "states_per_forward")
        if costs(tried).peaks["backward"] <= usable:
            break
    if "cuda_graphs" in may and len(cfg.data.sizes) < 2:
        again = tried.with_fields(cuda_graphs=True)
        return again if peak_of("cuda_graphs", costs(again)) <= usable else tried
    return tried


def _memoised(resolved: Resolved | None, device: Device) -> Callable[[Config], Costs]:
    seen: dict[Config, Costs] = {}

    def costs(cfg: Config) -> Costs:
        if cfg not in seen:
            seen[cfg] = predict(cfg, resolved, device.type)
        return seen[cfg]

    return costs


def is_out_of_memory(error: Exception) -> bool:
    """A CUDA device's memory, or a CPU's, is used up."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def out_of_memory(cfg: Config, phase: str, device: Device, resolved: Resolved | None = None) -> str:
    """What to tell somebody whose device has no memory left in a phase of the trainer's timer."""
    flat, busy = cfg.flat(), {"score", "rollout"} if phase == "validate" else {phase}
    advice = []
    for flag in (flag for flag, phases in DECIDES.items() if busy & set(phases)):
        if flag == "memory":
            if flat["fuse"] and flat[flag] == "fast" and not flat["gradient_checkpointing"]:
                advice.append(("--memory balanced", cfg.with_fields(memory="balanced"), flag))
        elif flag == "cuda_graphs":
            if flat[flag] and device.type == "cuda":
                advice.append(("--no-cuda_graphs", cfg.with_fields(cuda_graphs=False), flag))
        elif flag == "gradient_checkpointing":
            if not flat[flag]:
                advice.append(("--gradient_checkpointing", cfg.with_fields(gradient_checkpointing=True), flag))
        elif (value := flat[flag]) is not None and value > LEAST[flag]:
            lower = max(LEAST[flag], value // 2)
            advice.append((f"--{flag} {lower} (now {value})", cfg.with_fields(**{flag: lower}), flag))
    where = f"out of memory on {device.name}" + (f" in the phase {phase!r}" if phase else "")
    if not advice:
        return (
            f"{where}. Free the device of other programs, or try --scorer_dtype bf16, --optimizer adamw8bit, a lower "
            "--rank or --resolution; --dry_run predicts what each needs."
        )
    costs = _memoised(resolved, device)

    lines = [
        f"{text} (predicted {peak_of(flag, costs(cfg)) / GIB:.1f} -> {peak_of(flag, costs(lower)) / GIB:.1f} GiB)"
        for text, lower, flag in advice
    ]
    has = f", which has {device.memory_bytes / GIB:.1f} GiB" if device.memory_bytes else ""
    return f"{where}{has}. Try " + ", or ".join(lines) + ". Nothing is lost before the last checkpoint."
