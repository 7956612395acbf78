"""Prompt embeddings on disk: every prompt is encoded once, then the text encoders leave memory for good.

SDXL's two text encoders take 1.6 GB in 16 bits and would run again each epoch for rows that never change. One small
safetensors file a prompt (0.3 MB for SDXL in 16 bits) makes the cache shareable between runs and processes.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import os
import uuid
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

logger = logging.getLogger(__name__)

# Prompts always travel in batches of this size, the last padded with empty prompts: matrix products sum in an order
# that depends on the batch's shape, so with a fixed shape a row's bits do not depend on which prompts share its batch.
ENCODE_BATCH = 8
FINGERPRINT_BYTES = 1 << 20

Encoder = Callable[[list[str]], dict[str, Tensor]]  # B prompts -> e.g. prompt_embeds (B, L, D), pooled (B, P)
Row = dict[str, Tensor]  # one prompt's tensors, without the batch dimension


class PromptCache:
    """Rows of prompt embeddings, kept in `directory`, encoded on demand.

    fingerprint: names everything but the prompt that decides a row's values: the encoder's and tokenizer's files
    (fingerprint_files), its dtype, its settings. Another fingerprint reads other files.
    load_encoder: called only when a row is missing; the encoder is dropped again before ensure returns.
    memory_bytes: how much of what was read stays in host memory (the least recently used rows go first).
    The empty prompt "" (the unconditional one) is an ordinary entry.
    """

    def __init__(
        self,
        directory: str | Path,
        fingerprint: str,
        load_encoder: Callable[[], Encoder],
        memory_bytes: int = 256 << 20,
    ) -> None:
        self.directory, self.fingerprint, self.load_encoder = Path(directory), fingerprint, load_encoder
        self.memory_bytes = memory_bytes
        self._recent: OrderedDict[str, Row] = OrderedDict()  # oldest first
        self._recent_bytes = 0

    def ensure(self, prompts: Iterable[str]) -> int:
        """Encode the prompts that are not on disk yet. Returns how many that were.

        Looks at each file's header, which tells a torn file; get checks the values too.
        """
        missing = [prompt for prompt in dict.fromkeys(prompts) if not self._is_whole(prompt)]
        if missing:
            self._encode(missing)
        return len(missing)

    def get(self, prompts: Sequence[str], device: torch.device | str, dtype: torch.dtype) -> dict[str, Tensor]:
        """The prompts' rows, stacked: e.g. prompt_embeds (B, L, D), pooled (B, P). Only floats are cast to dtype."""
        if not prompts:
            raise ValueError("PromptCache.get was given no prompts, so there is nothing to stack. Pass at least one.")
        rows = self._rows(prompts)
        stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return {
            name: values.to(device, dtype if values.is_floating_point() else None) for name, values in stacked.items()
        }

    def path(self, prompt: str) -> Path:
        """The prompt's file. The zero byte keeps ("ab", "c") and ("a", "bc") apart."""
        digest = hashlib.sha256(f"{self.fingerprint}\0{prompt}".encode()).hexdigest()
        return self.directory / f"{digest}.safetensors"

    def _rows(self, prompts: Sequence[str]) -> list[Row]:
        """One row a prompt; all that are missing are encoded in one go."""
        rows = {prompt: self._recall(prompt) or self._read(prompt) for prompt in dict.fromkeys(prompts)}
        missing = [prompt for prompt, row in rows.items() if row is None]
        if missing:
            self._encode(missing)
            rows |= {prompt: self._read(prompt) for prompt in missing}
        whole = {prompt: row for prompt, row in rows.items() if row is not None}
        if len(whole) < len(rows):
            raise OSError(f"{self.directory}: a prompt's file cannot be read back after writing it. Check the disk.")
        for prompt, row in whole.items():
            self._remember(prompt, row)
        return [whole[prompt] for prompt in prompts]

    # ---- disk ----

    def _is_whole(self, prompt: str) -> bool:
        """Whether the prompt's file is there and complete. Reads the header only, which pins the file's length."""
        try:
            with safe_open(self.path(prompt), framework="pt") as file:
                return "crc32" in (file.metadata() or {})
        except FileNotFoundError:
            return False
        except (SafetensorError, OSError) as error:
            self._warn_corrupt(prompt, error)
            return False

    def _read(self, prompt: str) -> Row | None:
        """The row on disk; None if there is none or it is damaged (with a warning)."""
        try:
            with safe_open(self.path(prompt), framework="pt") as file:
                row = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator of its own)
                expected = (file.metadata() or {}).get("crc32")
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:
            self._warn_corrupt(prompt, error)
            return None
        if expected != checksum(prompt, row):
            self._warn_corrupt(prompt, "its checksum does not match")
            return None
        return row

    def _write(self, prompt: str, row: Row) -> None:
        # Renamed into place, so a reader sees the whole file or none; two processes that encode the same prompt replace
        # each other's equal tensors. No fsync: what a power cut tears is found by its header or checksum and redone.
        content = save(row, {"crc32": checksum(prompt, row), "prompt": prompt})
        final = self.path(prompt)
        temporary = final.with_name(f".{final.stem}.{uuid.uuid4().hex}.tmp")
        try:
            temporary.write_bytes(content)
            os.replace(temporary, final)
        finally:
            temporary.unlink(missing_ok=True)

    def _warn_corrupt(self, prompt: str, why: object) -> None:
        logger.warning(f"{self.path(prompt)} is damaged ({why}); encoding the prompt {prompt!r:.60} again")

    # ---- encoding ----

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        logger.info(f"encoding {len(prompts)} prompts into {self.directory}")
        encoder: Encoder | None = self.load_encoder()
        assert encoder is not None  # bound as Optional so that it can be dropped below
        try:
            for start in range(0, len(prompts), ENCODE_BATCH):
                batch = prompts[start : start + ENCODE_BATCH]
                for prompt, row in zip(batch, encode_rows(encoder, batch), strict=True):
                    self._write(prompt, row)
        finally:
            encoder = None
            gc.collect()  # modules hold reference cycles; without this the weights outlive the name
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()

    # ---- memory ----

    def _recall(self, prompt: str) -> Row | None:
        if prompt in self._recent:
            self._recent.move_to_end(prompt)
        return self._recent.get(prompt)

    def _remember(self, prompt: str, row: Row) -> None:
        if prompt not in self._recent:
            self._recent[prompt] = row
            self._recent_bytes += row_bytes(row)
        while self._recent_bytes > self.memory_bytes:
            _, oldest = self._recent.popitem(last=False)
            self._recent_bytes -= row_bytes(oldest)


def encode_rows(encoder: Encoder, prompts: list[str]) -> list[Row]:
    """At most ENCODE_BATCH prompts through the encoder at its fixed batch size; one row each, on the host."""
    padded = prompts + [""] * (ENCODE_BATCH - len(prompts))
    batched = encoder(padded)
    for name, values in batched.items():
        if values.shape[:1] != (ENCODE_BATCH,):
            raise ValueError(
                f"the text encoder returned {name} of shape {tuple(values.shape)} for {ENCODE_BATCH} prompts. "
                f"Its first dimension must be {ENCODE_BATCH}, one row a prompt."
            )
    host = {name: values.detach().cpu() for name, values in batched.items()}
    # clone: safetensors refuses tensors that share storage, and a row must not keep the whole batch alive
    return [{name: values[i].contiguous().clone() for name, values in host.items()} for i in range(len(prompts))]


def checksum(prompt: str, row: Row) -> str:
    """CRC-32 over the prompt and the tensors' bytes in order of their names, as 8 hex digits."""
    crc = zlib.crc32(prompt.encode())  # so that another prompt's file under this name is found out
    for name in sorted(row):
        flat = row[name].contiguous().reshape(-1)
        # viewed as bytes: numpy has no bfloat16
        crc = zlib.crc32(flat.view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def row_bytes(row: Row) -> int:
    return sum(values.nbytes for values in row.values())


def fingerprint_files(paths: Iterable[str | Path]) -> str:
    """sha256 (hex) over each file's folder and name, size, and first and last MiB, in any order of the paths.

    Not over all of it: hashing costs 1.5 s/GB at each start, and weights that differ in training differ in nearly every
    byte, so both ends tell them apart. The folder's name keeps text_encoder and text_encoder_2 from changing places.
    """
    parts = []
    for path in map(Path, paths):
        digest = hashlib.sha256(f"{path.parent.name}/{path.name} {path.stat().st_size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(FINGERPRINT_BYTES))
            file.seek(max(path.stat().st_size - FINGERPRINT_BYTES, 0))
            digest.update(file.read(FINGERPRINT_BYTES))
        parts.append(digest.hexdigest())
    return hashlib.sha256(" ".join(sorted(parts)).encode()).hexdigest()


def count_truncated(tokenizer: Any, prompts: Sequence[str]) -> int:
    """How many prompts are longer than the tokenizer's model_max_length (77 for CLIP): their ends are cut off."""
    # verbose=False: transformers would print its own warning about indexing errors, which truncation prevents
    if not prompts:
        return 0  # transformers cannot tokenize an empty list
    lengths = (len(ids) for ids in tokenizer(list(prompts), truncation=False, verbose=False).input_ids)
    return sum(length > tokenizer.model_max_length for length in lengths)
