"""Rows of tensors on disk, one small file a key: what a frozen network said about a prompt or an image, kept.

Files are renamed into place and checked by a CRC when they are read, so a cache is shareable between runs and processes
and a torn file is found out and made again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import uuid
import zlib
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

logger = logging.getLogger(__name__)

FINGERPRINT_BYTES, FINGERPRINT_SAMPLES, SAMPLE_BYTES = 1 << 20, 1024, 4096

Row = dict[str, Tensor]  # one key's tensors, without a batch dimension


class RowCache:
    """Rows kept in `directory`.

    fingerprint: names everything but the key that decides a row's values: the network's files (fingerprint_files), its
    dtype, its settings. Another fingerprint reads other files.
    memory_bytes: how much of what was read stays in host memory (the least recently used rows go first).
    """

    def __init__(self, directory: str | Path, fingerprint: str, memory_bytes: int = 0) -> None:
        self.directory, self.fingerprint, self.memory_bytes = Path(directory), fingerprint, memory_bytes
        self._recent: OrderedDict[str, Row] = OrderedDict()  # oldest first
        self._recent_bytes = 0

    def path(self, key: str) -> Path:
        """The key's file, in one of 256 folders. The zero byte keeps ("ab", "c") and ("a", "bc") apart."""
        digest = hashlib.sha256(f"{self.fingerprint}\0{key}".encode()).hexdigest()
        return self.directory / digest[:2] / f"{digest}.safetensors"

    def is_whole(self, key: str) -> bool:
        """Whether the key's file is there and complete. Reads the header only, which pins the file's length."""
        try:
            with safe_open(self.path(key), framework="pt") as file:
                return "crc32" in (file.metadata() or {})
        except FileNotFoundError:
            return False
        except (SafetensorError, OSError) as error:
            self._warn_corrupt(key, error)
            return False

    def read(self, key: str) -> Row | None:
        """The row in memory or on disk; None if there is none or it is damaged or not finite (with a warning)."""
        if key in self._recent:
            self._recent.move_to_end(key)
            return self._recent[key]
        try:
            with safe_open(self.path(key), framework="pt") as file:
                row = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator of its own)
                expected = (file.metadata() or {}).get("crc32")
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:
            self._warn_corrupt(key, error)
            return None
        if expected != checksum(key, row):
            self._warn_corrupt(key, "its checksum does not match")
            return None
        if not is_finite(row):
            self._warn_corrupt(key, "it holds a NaN or an infinity")
            return None
        return row

    def write(self, key: str, row: Row) -> None:
        """Keep a row. Raises ValueError for one that is not finite."""
        # Renamed into place, so a reader sees the whole file or none; two processes that make the same row replace
        # each other's equal tensors. No fsync: what a power cut tears is found by its header or checksum and redone.
        if not is_finite(row):
            dtypes = {str(values.dtype).removeprefix("torch.") for values in row.values()}
            raise ValueError(
                f"what a network made of {key!r:.60} is not finite in {', '.join(sorted(dtypes))}: nothing is kept of "
                "it. Use --mixed_precision bf16 or no, or mend the network's weights."
            )
        content = save(row, {"crc32": checksum(key, row), "key": key})
        final = self.path(key)
        temporary = final.with_name(f".{final.stem}.{uuid.uuid4().hex}.tmp")
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            os.replace(temporary, final)
        finally:
            temporary.unlink(missing_ok=True)

    def remember(self, key: str, row: Row) -> None:
        """Keep the row in memory while there is room."""
        if key not in self._recent:
            self._recent[key] = row
            self._recent_bytes += row_bytes(row)
        while self._recent_bytes > self.memory_bytes:
            _, oldest = self._recent.popitem(last=False)
            self._recent_bytes -= row_bytes(oldest)

    def _warn_corrupt(self, key: str, why: object) -> None:
        logger.warning(f"{self.path(key)} is damaged ({why}); making the row of {key!r:.60} again")


def checksum(key: str, row: Row) -> str:
    """CRC-32 over the key and the tensors' bytes in order of their names, as 8 hex digits."""
    crc = zlib.crc32(key.encode())  # so that another key's file under this name is found out
    for name in sorted(row):
        flat = row[name].contiguous().reshape(-1)
        # viewed as bytes: numpy has no bfloat16
        crc = zlib.crc32(flat.view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def is_finite(row: Row) -> bool:
    """Whether every number of a row is."""
    return all(bool(values.isfinite().all()) for values in row.values())


def row_bytes(row: Row) -> int:
    """What a row holds in memory."""
    return sum(values.nbytes for values in row.values())


def fingerprint_files(paths: Iterable[str | Path]) -> str:
    """sha256 (hex) over each file's folder and name, size, first MiB and samples of it all, in any order of the paths.

    Not over all of it: hashing costs 1.5 s/GB at each start. Samples lie close enough to meet every layer whose weights
    are larger than 1/1024 of the file. The folder's name keeps text_encoder and text_encoder_2 from changing places.
    """
    parts = []
    for path in map(Path, paths):
        size = path.stat().st_size
        digest = hashlib.sha256(f"{path.parent.name}/{path.name} {size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(FINGERPRINT_BYTES))
            for n in range(FINGERPRINT_SAMPLES + 1):
                file.seek(max(size - SAMPLE_BYTES, 0) * n // FINGERPRINT_SAMPLES)
                digest.update(file.read(SAMPLE_BYTES))
        parts.append(digest.hexdigest())
    return hashlib.sha256(" ".join(sorted(parts)).encode()).hexdigest()
