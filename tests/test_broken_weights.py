"""Runs whose weights break: they end with one line and leave nothing of it. Rates, decays and alphas beyond sense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import built, facts, flags, run_toy
from test_train_spm import line, pairs  # noqa: F401  (a fixture)

from spo_fast import train, train_spm
from spo_fast.config.errors import RunError
from spo_fast.config.preference import PreferenceConfig
from spo_fast.config.sections import AdamConfig
from spo_fast.models.policy import Policy
from spo_fast.training.step_sizes import StepSizes


def seeded(policy: Policy) -> Policy:
    """A LoRA in the middle of its training: B is not 0 any more."""
    generator = torch.Generator().manual_seed(0)
    for master in policy.masters:
        master.data = torch.randn(master.shape, generator=generator).to(master.dtype)
    return policy


@pytest.mark.parametrize("precision", ["no", "bf16", "fp64"])
@pytest.mark.parametrize("targets", [("to_q", "to_k"), ("conv1", "to_out.0", "time_emb_proj")])
def test_size_is_the_norm_of_what_loras_add(targets: tuple[str, ...], precision: str, tmp_path: Path) -> None:
    run = built(tmp_path / "run", lora_targets=targets, rank=3, lora_alpha=5, mixed_precision=precision)
    policy = seeded(run.policy)
    masters, added, base = dict(zip(policy.names, policy.masters, strict=True)), 0.0, 0.0
    for name, module in policy.network.named_modules():
        if hasattr(module, "lora_A"):
            a, b = (masters[f"{name}.lora_{x}.default.weight"].detach().double() for x in "AB")
            added += float((5 / 3 * torch.einsum("orxy,rixy->oixy", b[..., None, None] if b.ndim == 2 else b,
                            a[..., None, None] if a.ndim == 2 else a)).square().sum())  # fmt: skip
            base += float(module.base_layer.weight.double().square().sum())
    assert float(policy.size()) == pytest.approx(added**0.5, rel=1e-5)
    assert policy.reach is not None and float(policy.reach) == pytest.approx(base**0.5, rel=1e-5)


def test_size_of_a_new_lora_and_of_whole_weights(tmp_path: Path) -> None:
    assert float(built(tmp_path / "lora").policy.size()) == 0.0
    policy = built(tmp_path / "full", full_finetune=True).policy
    assert policy.reach is None
    whole = sum(float(p.detach().double().square().sum()) for p in policy.masters)
    assert float(policy.size()) == pytest.approx(whole**0.5, rel=1e-5)


class Weights:
    def __init__(self, reach: float | None):
        self.reach = None if reach is None else torch.tensor(reach)


@pytest.mark.parametrize(
    ("reach", "sizes", "ends"),
    [
        (10.0, [0.0, 1.0, 10.0, 19.0, 5.0], False),
        (10.0, [0.0, 10.1], True),
        (10.0, [500.0, 505.0, 511.0], False),  # a resumed run may have come far
        (10.0, [0.0, float("nan")], True),
        (10.0, [float("inf")], True),
        (None, [7.0, 13.9, 27.0, 3.0], False),
        (None, [7.0, 14.1], True),
        (None, [float("nan")], True),
    ],
)
def test_what_ends_a_run(reach: float | None, sizes: list[float], ends: bool) -> None:
    step = StepSizes(Weights(reach), AdamConfig(learning_rate=1e30, adam_weight_decay=1e-38))
    for size in sizes[:-1]:
        step.look(size)
    if not ends:
        step.look(sizes[-1])
        return
    with pytest.raises(RunError, match=r"an optimizer step .*--learning_rate \(1e\+30\)") as caught:
        step.look(sizes[-1])
    assert len(str(caught.value)) <= 290


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "learning rate": ({"learning_rate": 1e30, "adam_weight_decay": 0}, "an optimizer step"),
    "a learning rate of 100": ({"learning_rate": 100, "adam_weight_decay": 0}, "more than the weights' own size"),
    "of whole weights": ({"learning_rate": 1e30, "adam_weight_decay": 0, "full_finetune": True}, "an optimizer step"),
    "of some steps": ({"learning_rate": 1e30, "adam_weight_decay": 0, "max_train_steps": 3}, "an optimizer step"),
    "weight decay": ({"adam_weight_decay": 1e30}, "adam_weight_decay is 1e+27"),
    "both": ({"adam_weight_decay": 10, "learning_rate": 0.1}, "adam_weight_decay is 1:"),
    "beyond float32": ({"learning_rate": 1e38, "adam_weight_decay": 0}, "--learning_rate=1e+38 is too large a number"),
    "an epsilon beyond it": ({"adam_epsilon": 1e39}, "--adam_epsilon=1e+39 is too large a number"),
    "alpha": ({"lora_alpha": 1e30}, "were not finite"),
    "an alpha of 1e9": ({"lora_alpha": 1e9}, "more than the weights' own size"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_nothing_of_a_broken_run_is_left(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings, words = BROKEN[case]
    out = tmp_path / "run"
    assert train.main(flags(out, **{"max_train_steps": 1, "checkpointing_steps": 1, **settings})) in (1, 2)
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: ") and len(error) <= 300 and error.count("\n") == 1, error
    assert not list(out.rglob("pytorch_lora_weights.safetensors")) and not list(out.glob("checkpoint-*"))
    assert not (out / "unet").exists()


@pytest.mark.parametrize(
    "settings",
    [{"rank": 128, "lora_alpha": 256}, {"rank": 1}, {"full_finetune": True},
     {"learning_rate": 1e-2, "lora_targets": ["conv1", "to_q"]}],
)  # fmt: skip
def test_a_sane_run_is_never_ended(settings: dict[str, Any], tmp_path: Path) -> None:
    """At the highest learning rate of the toy's claims."""
    run_toy(tmp_path / "run", **{"max_train_steps": 2, "train_batch_size": 1, "learning_rate": 5e-3, **settings})
    assert facts(tmp_path / "run")[-1]["optimizer_steps"] == 8


def test_a_preference_model_of_nonsense_is_not_written(
    pairs: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, settings = tmp_path / "run", {"pairs": pairs, "max_train_steps": 2, "adam_weight_decay": 0}
    assert train_spm.main(line(out, learning_rate=1e30, **settings)) == 1
    error = capsys.readouterr().err
    assert "an optimizer step" in error and len(error) <= 300 and "--learning_rate (1e+30)" in error
    assert not (out / "preference_model").exists() and not list(out.glob("checkpoint-*"))
    with pytest.raises(ValueError, match="turns the weights around"):
        PreferenceConfig().with_fields(learning_rate=1.0, adam_weight_decay=1.0)
