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
    """

    def __init__(self, directory: str | Path, fingerprint: str) -> None:
        self.directory, self.fingerprint = Path(directory), fingerprint

    def path(self, key: str) -> Path:
        """The key's file, in one of 256 folders. The zero byte keeps ("ab", "c") and ("a", "bc") apart."""
        digest = hashlib.sha256(f"{self.fingerprint}\0{key}".encode()).hexdigest()
        return self.directory / digest[:2] / f"{digest}.safetensors"

    def read(self, key: str) -> Row | None:
        """The row on disk; None if there is none or it is damaged or not finite (with a warning)."""
        try:
            with safe_open(self.path(key), framework="pt") as file:
                row = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator of its own)
                expected = (file.metadata() or {}).get("crc32")
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:
            self._warn_corrupt(key, error)
            return None
        if wrong := wrong_with(key, row, expected):
            self._warn_corrupt(key, wrong)
            return None
        return row

    def write(self, key: str, row: Row) -> None:
        """Keep a row. Raises ValueError for one that is not finite."""
        check_finite(key, row)
        write_whole(self.path(key), save(row, {"crc32": checksum(key, row), "key": key}))

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


def check_finite(key: str, row: Row) -> None:
    """Raises ValueError for a row that is not, made of `key`."""
    if not is_finite(row):
        dtypes = {str(values.dtype).removeprefix("torch.") for values in row.values()}
        raise ValueError(
            f"what a network made of {key!r:.60} is not finite in {', '.join(sorted(dtypes))}: nothing is kept of "
            "it. Use --mixed_precision bf16 or no, or mend the network's weights."
        )


def wrong_with(key: str, row: Row, expected: str | None) -> str | None:
    """Why a row that was read back is not to be used; None if it is what was written."""
    if expected != checksum(key, row):
        return "its checksum does not match"
    return None if is_finite(row) else "it holds a NaN or an infinity"


def write_whole(file: Path, content: bytes) -> None:
    """The file is there whole or not at all; folders are made."""
    # Renamed into place; two processes that make the same row replace each other's equal tensors. No fsync: what a
    # power cut tears is found by its header or checksum and made again.
    temporary = file.with_name(f".{file.stem}.{uuid.uuid4().hex}.tmp")
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.write_bytes(content)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


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
