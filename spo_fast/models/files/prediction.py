"""What a single file says of its network's output and noise schedule, as a scheduler's settings.

Weights do not show what a network predicts, and a v-prediction taken for epsilon trains without an error. Files tell it
in four ways: metadata (the ModelSpec standard), empty tensors as markers (ComfyUI), a YAML file of the original code
beside the file, and the original code's alphas_cumprod. Nothing heavy is imported.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from spo_fast.data.files import read_header, read_metadata, shown

METADATA = ("modelspec.prediction_type", "modelspec.predict_key")  # the standard's, and ComfyUI's
NAMES = {
    **dict.fromkeys(("epsilon", "eps"), "epsilon"),
    **dict.fromkeys(("v", "v_prediction", "v-prediction", "v_pred", "vpred", "velocity"), "v_prediction"),
    **dict.fromkeys(("sample", "x0"), "sample"),
}
SCALINGS = {"EpsScaling": "epsilon", "VScaling": "v_prediction"}  # of the SGM code
BETAS = {"linear": "scaled_linear", "sqrt_linear": "linear"}  # the original code's names -> diffusers'
ALPHAS, BETA_SCHEDULES = "alphas_cumprod", ("linear", "scaled_linear")
DTYPES = {"F64": ("d", 1e-4), "F32": ("f", 1e-4), "F16": ("e", 2e-3), "BF16": ("H", 1e-2)}  # code, its relative error


def scheduler_settings(file: Path, settings: Mapping[str, Any], explicit: bool) -> dict[str, Any]:
    """settings with what the file says in their place; explicit: they were given with the file, and count as much.

    Raises ValueError for what contradicts itself or cannot be read.
    """
    found = dict(settings)
    told: dict[str, str] = {}  # where -> what
    if explicit and settings.get("prediction_type"):
        told["its settings"] = settings["prediction_type"]
    names, metadata = read_header(file), read_metadata(file)
    for key in METADATA:
        if value := metadata.get(key):
            told[f"its metadata ({key})"] = _known(value, file)
    if "v_pred" in names:
        told["its tensor v_pred"] = "v_prediction"
    if metadata.get("ss_v_parameterization", "").lower() == "true":
        told["its metadata (ss_v_parameterization)"] = "v_prediction"
    rescaled = ["ztsnr"] if "ztsnr" in names else []
    rescaled += ["ss_zero_terminal_snr"] if metadata.get("ss_zero_terminal_snr", "").lower() == "true" else []
    for beside, params in params_beside(file).items():
        if prediction := _of_yaml(params, beside):
            told[beside.name] = prediction
        found |= _schedule_of_yaml(params, beside)
    if ALPHAS in names:
        if (which := _which_schedule(_values(file, ALPHAS), names[ALPHAS]["dtype"], found)) is None:
            raise ValueError(
                f"{shown(file)} holds alphas_cumprod of another noise schedule than its settings'. "
                "Convert it to a diffusers directory, whose scheduler_config.json says which."
            )
        rescaled += [ALPHAS] if which == "rescaled" else []
    if rescaled:  # nothing is left to see at alphabar 0, where epsilon says nothing of x0
        told.setdefault(f"zero terminal SNR ({rescaled[0]})", "v_prediction")
        found["rescale_betas_zero_snr"] = True
    if len(set(told.values())) > 1:
        both = "; ".join(f"{where} says {what}" for where, what in told.items())
        raise ValueError(f"{shown(file, 90)}: {both}. Delete what is wrong, or convert it to a diffusers directory.")
    return {**found, "prediction_type": next(iter(told.values()))} if told else found


def contradicts(file: Path, settings: Mapping[str, Any]) -> None:
    """Raise ValueError if a diffusers directory's file of weights says another prediction than its scheduler."""
    says = {key: _known(value, file) for key, value in read_metadata(file).items() if key in METADATA and value}
    scheduler = settings.get("prediction_type", "epsilon")
    if wrong := [key for key, value in says.items() if value != scheduler]:
        raise ValueError(
            f"{shown(file)} says {says[wrong[0]]} ({wrong[0]}), but scheduler/scheduler_config.json {scheduler} "
            "(prediction_type). Mend the one that is wrong."
        )


def _known(value: str, file: Path) -> str:
    if (name := str(value).strip().lower()) not in NAMES:
        raise ValueError(f"{shown(file)} says that its network predicts {value!r:.40}. Known are {', '.join(NAMES)}.")
    return NAMES[name]


# ----------------------------------------------------------------------------------------------------------------- YAML


def params_beside(file: Path) -> dict[Path, Mapping[str, Any]]:
    """A single file's YAML files of its name -> what they set."""
    return {path: _params(path) for end in (".yaml", ".yml") if (path := file.with_suffix(end)).is_file()}


def check_scale(file: Path, scaling_factor: float | None) -> None:
    """Raise ValueError if a YAML file beside it scales latents by another factor than its VAE is used with."""
    for path, params in params_beside(file).items():
        if (scale := params.get("scale_factor")) not in (None, scaling_factor):
            raise ValueError(
                f"{shown(path)} has scale_factor={scale!r:.40}, but this VAE's scaling_factor is {scaling_factor}. "
                "Convert the model to a diffusers directory."
            )


def _params(file: Path) -> Mapping[str, Any]:
    """model.params of the original code's YAML; empty if it is another's."""
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        why = " ".join(str(error).split())[:100]
        raise ValueError(f"{shown(file)}, beside the model's file, is not YAML ({why}). Mend or remove it.") from error
    return _inside(tree, "model", "params")


def _inside(tree: object, *keys: str) -> Mapping[str, Any]:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree if isinstance(tree, Mapping) else {}


def _of_yaml(params: Mapping[str, Any], file: Path) -> str | None:
    if (parameterization := params.get("parameterization")) is not None:
        return _known(parameterization, file)
    scaling = _inside(params, "denoiser_config", "params", "scaling_config").get("target")
    if scaling is None:
        return None
    if (name := str(scaling).rpartition(".")[2]) not in SCALINGS:
        raise ValueError(f"{shown(file)} has {name:.40}, which is not trained here. Known are {', '.join(SCALINGS)}.")
    return SCALINGS[name]


def _schedule_of_yaml(params: Mapping[str, Any], file: Path) -> dict[str, Any]:
    names = {"linear_start": "beta_start", "linear_end": "beta_end", "timesteps": "num_train_timesteps"}
    found: dict[str, Any] = {}
    for ldm, ours in names.items():
        if ldm in params:
            try:
                found[ours] = int(params[ldm]) if ldm == "timesteps" else float(params[ldm])
            except (TypeError, ValueError, OverflowError):
                raise ValueError(f"{shown(file)}: {ldm}={params[ldm]!r:.40} is not a number. Mend it.") from None
            if not (found[ours] > 1 if ldm == "timesteps" else 0 < found[ours] < 1):
                fits = "above 1" if ldm == "timesteps" else "between 0 and 1"
                raise ValueError(f"{shown(file)}: {ldm}={params[ldm]!r:.40} must be {fits}. Mend it.")
    if (schedule := params.get("beta_schedule")) is not None:
        if schedule not in list(BETAS):
            raise ValueError(f"{shown(file)}: beta_schedule={schedule!r:.40} is none of {', '.join(BETAS)}.")
        found["beta_schedule"] = BETAS[schedule]
    return found


# ------------------------------------------------------------------------------------------------------- alphas_cumprod


def _values(file: Path, name: str) -> list[float]:
    """A tensor's numbers without a library."""
    entry = read_header(file)[name]
    begin, end = entry["data_offsets"]
    code = DTYPES.get(entry["dtype"], ("", 0.0))[0]
    with file.open("rb") as f:
        start = 8 + struct.unpack("<Q", f.read(8))[0]
        f.seek(start + begin)
        content = f.read(end - begin)
    if not code:
        return []
    numbers = struct.unpack(f"<{len(content) // struct.calcsize(code)}{code}", content)
    if entry["dtype"] == "BF16":  # the upper half of a float32
        return list(struct.unpack(f"<{len(numbers)}f", struct.pack(f"<{len(numbers)}I", *(n << 16 for n in numbers))))
    return list(numbers)


def _which_schedule(found: Sequence[float], dtype: str, settings: Mapping[str, Any]) -> str | None:
    """ "plain" or "rescaled" (to zero terminal SNR) if these are the alphas_cumprod of a scheduler's settings."""
    plain = alphas_cumprod(settings)
    tolerance = DTYPES.get(dtype, ("", 0.0))[1]
    for name, wanted in (("plain", plain), ("rescaled", rescaled_to_zero(plain))):
        if len(found) == len(wanted) and all(
            abs(a - b) <= tolerance * b + 1e-5 for a, b in zip(found, wanted, strict=True)
        ):
            return name
    return None


def alphas_cumprod(settings: Mapping[str, Any]) -> list[float]:
    """Of T betas that rise linearly, or whose roots do (scaled_linear, Stable Diffusion's), as diffusers has it."""
    betas = settings.get("trained_betas")
    if not betas:
        steps, power = settings["num_train_timesteps"], 2 if settings["beta_schedule"] == "scaled_linear" else 1
        first, last = (settings[name] ** (1 / power) for name in ("beta_start", "beta_end"))
        betas = [(first + (last - first) * i / (steps - 1)) ** power for i in range(steps)]
    return list(itertools.accumulate((1 - beta for beta in betas), lambda a, b: a * b))


def rescaled_to_zero(alphas: Sequence[float]) -> list[float]:
    """Zero terminal SNR (arXiv 2305.08891, algorithm 1): roots moved and stretched, the first as it was, the last 0."""
    roots = [math.sqrt(a) for a in alphas]
    first, last = roots[0], roots[-1]
    return [((root - last) * first / (first - last)) ** 2 for root in roots]
