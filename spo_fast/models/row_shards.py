"""Rows of tensors on disk, many to a file: what a frozen network said about prompts, shared by runs and processes.

A file (a shard) is written once, renamed into place under a name of its own, and never changed. So a reader sees whole
files only, a killed process leaves none behind, and two that make the same rows keep them twice. Which rows a file
holds stands in its header; each row is checked by a CRC when it is read, and made again if that does not match.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from spo_fast.models.tensor_cache import Row, check_finite, checksum, write_whole, wrong_with

logger = logging.getLogger(__name__)

UNREADABLE = (SafetensorError, OSError, ValueError, LookupError, TypeError)
"""What a file that is torn, or none of ours, gives rise to."""


class RowShards:
    """Rows of one shape by key.

    fingerprint: names everything but the key that decides a row's values, as RowCache's. Another fingerprint has a
    folder of its own.
    """

    def __init__(self, directory: str | Path, fingerprint: str):
        self.directory = Path(directory) / hashlib.sha256(fingerprint.encode()).hexdigest()[:16]
        self._places: dict[str, tuple[Path, int, str]] = {}  # key -> its file, its row there, its checksum
        self._seen: set[str] = set()  # names of files whose headers were read

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those without a row, each once. Headers are read, of files that were not there before; values are not."""
        wanted = dict.fromkeys(keys)
        if any(key not in self._places for key in wanted):
            self._look()
        return [key for key in wanted if key not in self._places]

    def _look(self) -> None:
        try:
            listed = os.listdir(self.directory)  # names alone: paths of 4,000 files take 2.6 times as long
        except FileNotFoundError:
            return
        new = (self.directory / name for name in listed if name not in self._seen and name.endswith(".safetensors"))
        for file in sorted(new, key=_written):  # a row that was made again is in the later file
            self._seen.add(file.name)
            try:
                with safe_open(file, framework="pt") as shard:
                    held = shard.metadata()
                keys, sums = json.loads(held["keys"]), json.loads(held["crc32"])
                self._places |= {k: (file, i, crc) for i, (k, crc) in enumerate(zip(keys, sums, strict=True))}
            except FileNotFoundError:
                continue
            except UNREADABLE as error:
                logger.warning(f"{file} is damaged ({error}); its rows are made again")

    def read(self, keys: Iterable[str]) -> dict[str, Row]:
        """The rows of these keys, but for those that are not there, damaged or not finite (with a warning)."""
        found: dict[str, Row] = {}
        by_file: dict[Path, list[str]] = defaultdict(list)
        for key in keys:
            if key in self._places:
                by_file[self._places[key][0]].append(key)
        for file, its in by_file.items():
            try:
                with safe_open(file, framework="pt") as shard:
                    parts = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118 (no iterator)
                    for key in its:
                        _, i, crc = self._places[key]
                        row = {name: part[i : i + 1][0] for name, part in parts.items()}
                        if wrong := wrong_with(key, row, crc):
                            self._forget(key, wrong)
                        else:
                            found[key] = row
            except UNREADABLE as error:
                for key in its:
                    if key not in found:
                        self._forget(key, error)
        return found

    def _forget(self, key: str, why: object) -> None:
        file = self._places.pop(key)[0]
        logger.warning(f"{file} is damaged ({why}); making the row of {key!r:.60} again")

    def write(self, rows: Mapping[str, Row]) -> None:
        """Keep rows, in one file. Raises ValueError for one that is not finite."""
        for key, row in rows.items():
            check_finite(key, row)
        first = next(iter(rows.values()))
        stacked = {name: torch.stack([row[name] for row in rows.values()]) for name in first}
        sums = [checksum(key, row) for key, row in rows.items()]
        file = self.directory / f"{uuid.uuid4().hex}.safetensors"
        write_whole(file, save(stacked, {"keys": json.dumps(list(rows)), "crc32": json.dumps(sums)}))
        self._seen.add(file.name)
        self._places |= {key: (file, i, crc) for i, (key, crc) in enumerate(zip(rows, sums, strict=True))}


def _written(file: Path) -> int:
    """When, in ns; a file that is gone comes first."""
    try:
        return os.stat(file).st_mtime_ns
    except FileNotFoundError:
        return 0
