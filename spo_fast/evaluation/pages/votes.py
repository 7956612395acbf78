"""Blind votes of people, read and summed up."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spo_fast.data.files import read_json
from spo_fast.evaluation.statistics import Interval, bootstrap

# as the user study of the SPO paper asks: (name, question, title of the table)
QUESTIONS = (
    ("general", "Which picture do you prefer, all in all?", "general preference"),
    ("appeal", "Which picture is more beautiful, whatever the prompt?", "visual appeal"),
    ("alignment", "Which picture fits the prompt better?", "prompt alignment"),
)


@dataclass(frozen=True)
class Vote:
    """One answer of a blind vote."""

    prompt: int
    image: int
    a: str
    b: str
    question: str
    choice: str  # a, b or tie


def read_votes(files: Sequence[Path], key: str, sides: Sequence[str], shown: Set[tuple[int, int]]) -> list[Vote]:
    """Votes of several people on pairs of the sides and on pictures (prompt, image) that were shown.

    Raises FileNotFoundError, or ValueError for votes of another comparison or damage.
    """
    votes = []
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"--votes {file} does not exist. Give what the report's Export button saved.")
        saved = read_json(file)
        if saved.get("key") != key:
            raise ValueError(f"{file} holds votes of another comparison (other pictures or contenders). Leave it out.")
        if not isinstance(found := saved.get("votes"), list):
            raise ValueError(f"{file}: its votes are a JSON {type(found).__name__}, not a list. Export it again.")
        for number, vote in enumerate(found, 1):
            if not is_vote(vote, sides) or (vote["prompt"], vote["image"]) not in shown:
                raise ValueError(f"{file}, vote {number}: {vote!s:.80} is not a vote. Export it again.")
            votes.append(Vote(**vote))
    return votes


def is_vote(found: Any, sides: Sequence[str]) -> bool:
    """Whether an entry of an exported file is a vote between two of these sides."""
    kinds = {"prompt": int, "image": int, "a": str, "b": str, "question": str, "choice": str}
    if not isinstance(found, dict) or {name: type(value) for name, value in found.items()} != kinds:
        return False
    if found["a"] == found["b"] or not {found["a"], found["b"]} <= set(sides):
        return False
    return found["choice"] in ("a", "b", "tie") and found["question"] in {name for name, *_ in QUESTIONS}


def user_study(votes: Sequence[Vote], seed: int) -> dict[tuple[str, str], dict[str, tuple[Interval, int]]]:
    """(a, b) -> question -> (share of the votes for b, a tie being half, with its interval over votes; their number).

    With several votes on a pair the interval is over pairs: two people's votes on one pair are no two pairs.
    """
    table: dict[tuple[str, str], dict[str, tuple[Interval, int]]] = {}
    worth = {"a": 0.0, "b": 1.0, "tie": 0.5}
    for pair in dict.fromkeys((v.a, v.b) for v in votes):
        for question, _, _ in QUESTIONS:
            by_picture: dict[tuple[int, int], list[float]] = {}
            for v in votes:
                if (v.a, v.b) == pair and v.question == question:
                    by_picture.setdefault((v.prompt, v.image), []).append(worth[v.choice])
            if by_picture:
                shares = np.array([np.mean(values) for values in by_picture.values()])
                count = sum(map(len, by_picture.values()))
                table.setdefault(pair, {})[question] = (bootstrap(shares, seed), count)
    return table
