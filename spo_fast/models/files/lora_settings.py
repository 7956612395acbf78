"""What a LoRA's settings say of its strength: PEFT's LoraConfig, which diffusers keeps in a file's metadata and PEFT in
a file beside it.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from spo_fast.data.files import read_header, read_json
from spo_fast.models.files.lora_files import PEFT_CONFIG, PEFT_FILE

Refuse = Callable[[str], NoReturn]  # raises ValueError: the file's name and what is wrong
PEFT_NAME = re.compile(r"base_model\.model\.")
# of a LoraConfig: what is read, and what changes nothing once a LoRA was trained
READ = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"}
HARMLESS = {
    *("target_modules", "exclude_modules", "lora_dropout", "fan_in_fan_out", "inference_mode", "revision", "task_type"),
    *("peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "layers_to_transform", "layers_pattern"),
    *("megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying", "lora_bias"),
}
PLAIN_STARTS = (True, "gaussian", "eva", "orthogonal")  # of the matrices; others change the base's weights as well


@dataclass(frozen=True)
class Told:
    """What a LoRA's settings say: diffusers keeps PEFT's LoraConfig in the file's metadata, PEFT in a file beside."""

    alpha: float | None
    alphas: dict[str, float]  # patterns of layers
    rank: int | None
    ranks: dict[str, int]
    by_root: bool  # rsLoRA
    is_dora: bool

    @classmethod
    def of(cls, file: Path, refuse: Refuse) -> Told:
        """What a file's metadata says of its LoRA."""
        from safetensors import safe_open

        with safe_open(file, framework="pt") as f:
            text = (f.metadata() or {}).get("lora_adapter_metadata")
        beside = file.with_name(PEFT_CONFIG)
        config: dict[str, Any] = {}  # JSON, checked below
        if text is not None:
            written = None
            with contextlib.suppress(ValueError, RecursionError):
                written = json.loads(text)
            if not isinstance(written, dict):
                refuse("is damaged: its lora_adapter_metadata is no JSON object. Save it again.")
            told = [(re.match(r"(?:unet|transformer)\.", key), key, value) for key, value in written.items()]
            config = {key[m.end() :]: value for m, key, value in told if m}
            config = config or {key: value for key, value in written.items() if "." not in key}
        elif file.name == PEFT_FILE or (beside.is_file() and any(map(PEFT_NAME.match, read_header(file)))):
            if not beside.is_file():
                refuse(
                    f"is PEFT's, which writes {PEFT_CONFIG} beside it, where alpha stands: it is missing. Copy it too."
                )
            config = read_json(beside)
        if not config:
            return cls(None, {}, None, {}, False, False)
        odd = [key for key, value in config.items() if key not in READ | HARMLESS and not _says_nothing(key, value)]
        if odd:
            refuse(f"was trained with {odd[0]:.40}={config[odd[0]]!s:.40}, which is not read here. Merge it.")
        alpha, rank = config.get("lora_alpha"), config.get("r")
        patterns = [config.get(key) or {} for key in ("alpha_pattern", "rank_pattern")]
        numbers = [
            alpha,
            *([] if rank is None else [rank]),
            *(v for p in patterns if isinstance(p, dict) for v in p.values()),
        ]
        if not all(isinstance(p, dict) for p in patterns) or not all(_positive(n) for n in numbers):
            refuse(
                "is damaged: its settings must give lora_alpha, and any patterns, as positive numbers. Save it again."
            )
        return cls(alpha, patterns[0], rank, patterns[1], bool(config.get("use_rslora")), bool(config.get("use_dora")))

    def scale(self, layer: str, rank: int, alpha: float | None, refuse: Refuse) -> float:
        """alpha / rank of a layer; alpha: what the file's own tensor says."""
        if self.alpha is None:
            return 1.0 if alpha is None else alpha / rank
        from peft.utils.other import get_pattern_key

        try:
            told = self.ranks.get(get_pattern_key(list(self.ranks), layer), self.rank)
            mine = self.alphas.get(get_pattern_key(list(self.alphas), layer), self.alpha)
        except re.error as error:
            refuse(f"is damaged: its rank_pattern or alpha_pattern is no pattern ({error}). Save it again.")
        if told is not None and told != rank:
            refuse(f"is damaged: {layer} has rank {rank}, but its settings say {told}. Save it again.")
        scale = mine / (math.sqrt(rank) if self.by_root else rank)
        if alpha is not None and not math.isclose(scale, alpha / rank, rel_tol=1e-3):  # alphas are kept in 16 bits too
            refuse(
                f"contradicts itself: {layer} has alpha {alpha:g}, its settings say {scale * rank:g}. Save it again."
            )
        return scale


def _says_nothing(key: str, value: object) -> bool:
    """A setting of a LoraConfig that is off."""
    if key == "init_lora_weights":
        return not value or value in PLAIN_STARTS
    return not value or (key, value) == ("bias", "none")


def _positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
