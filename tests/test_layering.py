"""Imports go strictly downward, and importing the package costs nothing."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "spo_fast"
ORDER = (
    ("ops",),
    ("schedule", "experience", "noise", "config", "extras", "files", "splits"),
    ("weights",),
    ("models", "scorers"),
    ("rollout", "offline"),
    ("objectives", "window"),
    ("checkpoint", "metrics", "data", "pairs", "presets", "watch", "distributed", "stopping"),
    ("preference_report", "pair_images", "prompt_sets", "measure"),
    ("costs",),
    ("choices",),
    ("engine",),
    ("report", "telemetry"),
    ("model_card",),
    ("trainer", "dry_run"),
    ("preference_trainer",),
    ("cli",),
    ("train", "train_spm", "evaluate"),
    ("compare",),
)
LAYERS = {part: number for number, parts in enumerate(ORDER) for part in parts}
# the embedded toy stands beside the layers: models/ asks it for its files, it uses scorers/ and models/ to make them
BESIDE = {"toy", "prompts"}


def layer_of(module: str) -> int | None:
    part = module.split(".")[1]
    return None if part in BESIDE else LAYERS[part]


def imports():
    """(file, importing module's part, imported spo_fast module) of every import statement, wherever it stands."""
    for file in sorted(PACKAGE.rglob("*.py")):
        part = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module] if node.module != "spo_fast" else [f"spo_fast.{a.name}" for a in node.names]
            elif isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            yield from ((file, part, name) for name in names if name.startswith("spo_fast."))


def test_every_module_has_a_layer():
    parts = {p.relative_to(PACKAGE).parts[0].removesuffix(".py") for p in PACKAGE.rglob("*.py")} - {"__init__"}
    assert parts <= set(LAYERS) | BESIDE, f"add {parts - set(LAYERS) - BESIDE} to LAYERS"


def test_imports_go_downward():
    seen = 0
    for file, part, name in imports():
        if part in BESIDE or layer_of(name) is None:
            continue
        seen += 1
        target = name.split(".")[1]
        lower = layer_of(name) < LAYERS[part] or target == part
        assert lower, f"{file.relative_to(PACKAGE)} (layer {LAYERS[part]}) imports {name} (layer {layer_of(name)})"
    assert seen > 30


def test_models_and_scorers_never_meet():
    pairs = {(part, name.split(".")[1]) for _, part, name in imports()}
    assert ("models", "scorers") not in pairs and ("scorers", "models") not in pairs
