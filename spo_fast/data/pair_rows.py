"""One labelled pair: the columns it is read from, and what makes a row bad."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np

from spo_fast.config.errors import RunError

PROMPT_COLUMNS = ("caption", "prompt")  # the first one present is read
LABEL_COLUMNS = ("label_0", "label_1")
COUNT_COLUMN, HAS_LABEL_COLUMN = "num_example_per_prompt", "has_label"
MIN_SEEN = 100  # rows before a share of bad ones means anything


class BadRowError(ValueError):
    """One row is unusable; the message is the reason."""


class LabelError(BadRowError):
    """Its labels are: no fault in a row that says it has none."""


class BadRows:
    """The rows left out, each once, in a file of JSON lines {"row": where, "reason": reason}.

    path: made at the first bad row. An existing file is read, so a resumed run neither recounts nor rewrites a row.
    limit: the share of bad rows above which `check` stops the run.
    """

    def __init__(self, path: Path, limit: float) -> None:
        self.path, self.limit = Path(path), limit
        self.reasons: dict[str, str] = {}  # by row, in order of discovery
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        try:
            for line in whole.splitlines():
                entry = json.loads(line)
                self.reasons[entry["row"]] = entry["reason"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path}: not a file of bad rows ({error!r}). Move it away.") from error
        if len(whole) < len(content):  # a crash tore the last line: the row is found again, and its line goes here
            with self.path.open("r+b") as file:
                file.truncate(len(whole))

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, where: str, reason: str) -> None:
        """Write a row and its reason down, once."""
        if where in self.reasons:
            return
        self.reasons[where] = reason
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:  # closed, so flushed, at once
            file.write(json.dumps({"row": where, "reason": reason}) + "\n")

    def check(self, seen: int, count: int | None = None, *, final: bool = False) -> None:
        """Raises RunError when more than `limit` of the rows seen are bad.

        count: bad ones among the `seen`; None: all in the file. Looks from 100 rows seen on, or when `final`.
        """
        count = len(self) if count is None else count
        if seen and (final or seen >= MIN_SEEN) and count / seen > self.limit:
            raise RunError(
                f"{count} of {seen} rows are unusable ({count / seen:.1%}; the limit is {self.limit:.1%}): "
                f"{self.examples()}. {self.path} names them all. Mend the data or raise the limit."
            )

    def examples(self) -> str:
        """The first three, for an error's text."""
        return "; ".join(f"{where}: {reason}" for where, reason in islice(self.reasons.items(), 3))


@dataclass(frozen=True)
class PairRow:
    """A labelled pair as its file has it; the images are read when they are asked for."""

    where: str  # file and row, as in bad_rows.jsonl
    prompt: str
    label: float  # preference for image 0: 1, 0, or 0.5 for a tie
    weight: float  # 1 / num_example_per_prompt: every prompt counts alike
    images: tuple[Callable[[], bytes], ...] = field(repr=False)

    def image(self, j: int) -> bytes:
        """The encoded image j (0 or 1). Raises BadRowError when it is missing."""
        return self.images[j]()


class PairSource(Protocol):
    """Rows known by their index 0..len-1; only those that passed the index pass count."""

    prompt_hash: np.ndarray  # (len,) uint64
    labelled: np.ndarray  # (len,) bool: a person gave the label
    tied: np.ndarray  # (len,) bool: neither image is preferred
    blocks: np.ndarray  # (len,) int32: rows with the same number are read together (a parquet row group)
    block_bytes: np.ndarray  # (blocks,) int64: what reading one holds in memory
    unlabelled: int  # rows left out because they have no label and say so
    seen: int  # rows there are, with all that were left out

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int] | np.ndarray) -> list[PairRow]:
        """The rows in the order asked for; each block they touch is read once."""
        ...


def checked(record: Mapping[str, object]) -> tuple[str, float, float]:
    """Prompt (stripped), label of image 0 and weight of a row, or BadRowError.

    Labels may be any shares in [0, 1] that add up to 1. Without a count column the weight is 1; an empty count is bad.
    """
    prompt = record["prompt"]
    if not isinstance(prompt, str):
        raise BadRowError(f"the prompt is {'missing' if prompt is None else f'{prompt!r:.40}, not text'}")
    if not prompt.strip():
        raise BadRowError("the prompt is empty")
    if re.search("[\ud800-\udfff]", prompt):
        raise BadRowError("the prompt is not valid Unicode")
    count = number(record, COUNT_COLUMN) if COUNT_COLUMN in record else 1.0
    if not 1 <= count < float("inf"):
        raise BadRowError(f"{COUNT_COLUMN} is {count:g}, not a number of at least 1")
    try:
        first, second = (number(record, name) for name in LABEL_COLUMNS)
        if not (0 <= first <= 1 and 0 <= second <= 1 and abs(first + second - 1) < 1e-6):
            raise BadRowError(f"labels {first:g} and {second:g} are not two shares within 0..1 that add up to 1")
    except BadRowError as error:
        raise LabelError(str(error)) from None
    return prompt.strip(), first, 1 / count


def number(record: Mapping[str, object], name: str) -> float:
    """A column's value. Raises BadRowError if it is none."""
    value = record.get(name)
    if value is None:
        raise BadRowError(f"{name} is missing")
    try:
        return float(value)  # type: ignore[arg-type]  # whatever stands there: TypeError tells
    except (TypeError, ValueError, OverflowError):
        raise BadRowError(f"{name} is {value!r:.40}, not a number") from None


def has_label(record: Mapping[str, object]) -> bool:
    """Whether the row says that it has one; without such a column all have."""
    return str(record.get(HAS_LABEL_COLUMN, True)).strip().lower() in ("true", "1", "1.0")


def prompt_column(name: str, present: list[str], images: Sequence[str], caption: str | None) -> str:
    """The prompt's column. Raises ValueError when a needed column is missing or stands there twice."""
    wanted = PROMPT_COLUMNS if caption is None else (caption,)
    chosen = next((column for column in wanted if column in present), " or ".join(wanted))
    if missing := [column for column in (chosen, *images, *LABEL_COLUMNS) if column not in present]:
        raise ValueError(
            f"{name}: no column {', '.join(missing)}; found {', '.join(map(str, present)) or 'none'}. "
            "Rename the columns (another name of the prompts' one can be given as caption_column)."
        )
    if repeated := {column for column in present if present.count(column) > 1}:
        raise ValueError(f"{name}: column {', '.join(repeated)} stands there twice. Rename or delete one.")
    return chosen
