"""The table of docs/methods.md that says when to choose a method, with its measured place on both toys.

python -m benchmarks.method_places     # writes it from the records of toy/claims.py and toy_flow.py, and prints it
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.records import DOCS, RESULTS, fill
from spo_fast.config.methods import METHODS
from spo_fast.config.tables import markdown
from spo_fast.toy import claims
from spo_fast.toy.claim_tables import OWN, SEEDS, over_seeds, runs_on, seeds_of

PAGE = DOCS / "methods.md"
RECORDS = RESULTS / "toy_claims.jsonl", RESULTS / "toy_flow_claims.jsonl"
CHOOSE = {
    "spo": (
        "best and worst of the children of one x_t",
        "a judge of steps (an SPM) for what you want: the least compute",
    ),
    "mspo": (
        "the same, of several steps each",
        "the same, where one step hardly changes a picture (a strong model, many steps)",
    ),
    "stepgrpo": (
        "all children of one x_t",
        "a judge of steps, and children that differ little: nothing is thrown away",
    ),
    "gradspo": ("SPO's pairs", "a judge of steps, and a target that stays near a moving average"),
    "lpo": ("children as noisy latents", "a latent reward model: no VAE in the rollout"),
    "grpo": ("whole trajectories", "a judge of finished pictures alone (GenEval, OCR); flows"),
    "ddpo": ("whole trajectories", "the same, on UNets as published"),
    "dpok": ("whole trajectories", "the same, held near the reference"),
    "d3po": ("two whole trajectories", "votes between two finished pictures"),
    "dense": ("ranked trajectories", "a judge of finished pictures, and early steps that matter most"),
    "nft": ("finished pictures, noised again", "flows, any sampler, no log-probabilities, use without guidance"),
    "awm": ("finished pictures, noised again", "the same"),
    "dpo": ("labelled pairs", "pairs and no judge: no rollouts at all"),
    "mapo": ("labelled pairs", "the same, without a reference in memory"),
}
"""What each learns from, and when to choose it."""


def gains(records: Mapping[str, Any]) -> dict[str, tuple[float, str]]:
    """Of each method that has run the mean gain of aesthetics over the guided base, and its cell: with its error, the
    layout's change and the seeds, where there are not three."""
    found = {}
    for name in METHODS:
        runs = seeds_of(name, records)
        if not runs:
            continue
        base = records["base"][OWN]
        rises = [r["aesthetics"][0] - base["aesthetics"][0] for r in runs]
        mean, error = over_seeds(rises, [r["aesthetics"][1] for r in runs])
        layout = sum(r["layout"][0] for r in runs) / len(runs) - base["layout"][0]
        seeds = "" if len(runs) == len(SEEDS) else f", {len(runs)} seed{'s' * (len(runs) > 1)}"
        found[name] = mean, f"{mean:+.2f} ± {error:.2f}, layout {layout:+.3f}{seeds}"
    return found


def places(records: Mapping[str, Any], size: str) -> dict[str, str]:
    """Each method's cell, with its place among those that have run on this toy."""
    found = gains(records)
    order = sorted(found, key=lambda name: -found[name][0])
    empty = {name: "not run" if name in runs_on(size) else "refused" for name in METHODS}
    return empty | {name: f"{place}. {found[name][1]}" for place, name in enumerate(order, 1)}


def table(records: Mapping[str, Any], flow: Mapping[str, Any]) -> str:
    """A row a method: on each toy its place and its gain over the guided base model, with the whole budget."""
    toys = places(records, "small"), places(flow, "flow")
    rows = [["`--method`", "learns from", "choose it with", "toy: place, gain of aesthetics", "toy-flow: the same"]]
    return markdown(rows + [[f"`{name}`", *words, *(toy[name] for toy in toys)] for name, words in CHOOSE.items()])


def main() -> None:
    """The command."""
    found = table(*(claims.current(claims.read(path)) for path in RECORDS))
    fill(PAGE, found, "method_places")
    print(found, end="")


if __name__ == "__main__":
    main()
