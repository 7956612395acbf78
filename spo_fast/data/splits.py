"""Which split of a data set a file belongs to, told by names: the hub's rule.

huggingface.co/docs/hub/datasets-file-names-and-splits, as `datasets` 5.2 applies it (data_files.py). The first of these
that fits any file decides for all: data/NAME-00000-of-00009.parquet; a keyword in the name of a folder; a keyword in
that of a file. A keyword stands alone or beside one of "-._ ", a digit, or an end of the name. Hidden files, and those
in folders that begin with __, belong to nothing. Nothing fits: all is for training.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
BESIDE = "[-._ 0-9]"
NAMED = {
    split: re.compile(rf"(.*{BESIDE})?({'|'.join(words)})({BESIDE}.*)?", re.DOTALL) for split, words in KEYWORDS.items()
}
SHARDED = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*\.[^/]*")


def splits_of(files: Iterable[str]) -> dict[str, list[str]]:
    """Paths with forward slashes -> split -> those of it, sorted. A file whose name fits two splits is in both."""
    shown = sorted(file for file in files if not _hidden(PurePosixPath(file)))
    found: dict[str, list[str]] = {}
    for file in shown:
        if match := SHARDED.fullmatch(file):
            found.setdefault(match[1], []).append(file)
    if found:
        return found
    for names in (lambda path: path.parts[:-1], lambda path: path.parts[-1:]):
        for split, named in NAMED.items():
            if fitting := [file for file in shown if any(map(named.fullmatch, names(PurePosixPath(file))))]:
                found[split] = fitting
        if found:
            return found
    return {"train": shown} if shown else {}


def _hidden(path: PurePosixPath) -> bool:
    return any(part.startswith(".") for part in path.parts) or any(p.startswith("__") for p in path.parts[:-1])


def files_of(name: str, files: Iterable[str], wanted: str) -> list[str]:
    """The files of a split, sorted; prints what is read and what is left if there is a choice. `name` is for messages.

    wanted: train, or validation: then test or, if there is no other, train takes its place. Splits of other names
    (data/train_unique-00000-of-00001.parquet) count as what their names hold. Raises ValueError if there is none.
    """
    files = sorted(files)
    splits = splits_of(files)
    for split in {"train": ("train",), "validation": ("validation", "test", "train")}[wanted]:
        fitting = [split] if split in splits else [other for other in splits if NAMED[split].fullmatch(other)]
        taken = sorted({file for other in fitting for file in splits[other]})
        if taken:
            break
    else:
        there = ", ".join(f"{split} ({len(those)})" for split, those in splits.items()) or "hidden ones only"
        raise ValueError(
            f"{name}: no {wanted} split among its files, which are told by their names: {there:.100}. Give the file to "
            "read itself, or a folder in which files are not named after splits."
        )
    left = {other: len(set(those) - set(taken)) for other, those in splits.items()}
    left["of no split"] = len(files) - len({file for those in splits.values() for file in those})
    if len(files) > 1:
        rest = ", ".join(f"{count} {other}" for other, count in left.items() if count)
        shown = ", ".join(taken[:3]) + (", ..." if len(taken) > 3 else "")
        count = f"{len(taken)} of {len(files)} files" if rest else f"all {len(files)} files"
        print(f"{name}: reading {count}, {', '.join(fitting)}: {shown}{f'; left: {rest}' if rest else ''}")
    return taken
