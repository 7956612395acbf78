"""What a report says of a run's records, each of which is looked at once, however many reports follow."""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Column(NamedTuple):
    """A field's numbers: which records have it, and what they say; NaN where it was not finite."""

    rows: array[int]
    values: array[float]


class Warned(NamedTuple):
    """What went wrong: the last time's words, the iterations done when it first and last did, and how often."""

    text: str
    first: int
    times: int
    last: int


class History:
    """The records of metrics.jsonl in their order. 16 bytes a number, so 20,000 iterations take some 10 MB."""

    def __init__(self) -> None:
        self.iterations = array("q")  # each record's
        self.columns: dict[str, Column] = {}
        self.epoch_starts: list[int] = []  # iterations with another epoch than the one before
        self.warnings: dict[str, Warned] = {}
        """By their words without numbers."""
        self.signs = ""  # of reward hacking, in the latest validation
        self.pairs = 0  # terms trained on
        self.milliseconds = 0.0  # in all phases
        self._epoch: object = None

    def __len__(self) -> int:
        return len(self.iterations)

    def add(self, record: Mapping[str, object]) -> None:
        """The next record, as it is logged."""
        number, iteration = len(self), record["iteration"]
        assert isinstance(iteration, int)
        if number and record.get("epoch") != self._epoch:
            self.epoch_starts.append(iteration)
        self.iterations.append(iteration)
        self._epoch = record.get("epoch")
        for name, value in record.items():
            if value is None or isinstance(value, (int, float)):
                rows, values = self.columns.setdefault(name, Column(array("q"), array("d")))
                rows.append(number)
                values.append(math.nan if value is None else value)
        self.milliseconds += sum(v for n, v in record.items() if n.endswith("_ms") and isinstance(v, (int, float)))
        self.pairs += record.get("pairs") or 0  # type: ignore[operator]  # a number, where there is one
        self.signs = str(record.get("hacking", self.signs))
        bad = [f"{name} was not finite" for name in record.get("nonfinite", {})]  # type: ignore[attr-defined]
        for text in (*record.get("warnings", ()), *bad):  # type: ignore[misc]
            kind = re.sub(r"\d[\d.,]*", "#", text)
            before = self.warnings.get(kind, Warned("", iteration + 1, 0, 0))
            self.warnings[kind] = Warned(text, before.first, before.times + 1, iteration + 1)

    def curve(self, field: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """(iterations done, values) of the records that have the field."""
        rows, values = self.columns.get(field, (array("q"), array("d")))
        done = np.array(self.iterations, dtype=float)[np.array(rows, dtype=int)] + 1
        return done, np.array(values, dtype=float)

    def filled(self, field: str) -> npt.NDArray[np.float64]:
        """The field of every record, 0 where it is missing or not finite."""
        rows, values = self.columns[field]
        found = np.zeros(len(self))
        found[np.array(rows, dtype=int)] = np.nan_to_num(np.array(values, dtype=float))
        return found

    def latest(self, field: str) -> float | None:
        """The last finite value; None if there is none."""
        column = self.columns.get(field)
        return None if column is None else next((v for v in reversed(column.values) if math.isfinite(v)), None)
