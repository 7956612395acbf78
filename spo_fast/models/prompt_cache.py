"""Prompt embeddings on disk: every prompt is encoded once, then the text encoders leave memory.

SDXL's two text encoders take 1.6 GB in 16 bits and would run again each epoch for rows that never change. Rows (0.3 MB
for SDXL in 16 bits) are kept in files of many, which runs and processes share (row_shards.py).
"""

from __future__ import annotations

import gc
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spo_fast.method.experience import to_device
from spo_fast.models.row_shards import RowShards
from spo_fast.models.tensor_cache import Row, check_finite, row_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Prompts always travel in batches of this size, the last padded with empty prompts: matrix products sum in an order
# that depends on the batch's shape, so with a fixed shape a row's bits do not depend on which prompts share its batch.
ENCODE_BATCH = 8
SHARD_BYTES, SHARD_ROWS = 32 << 20, 1024
"""A file is written when so much has been encoded, or when nothing is left to encode; a kill loses no more."""
TOKENIZE_BATCH = 1024

Encoder = Callable[[list[str]], dict[str, Tensor]]  # B prompts -> e.g. prompt_embeds (B, L, D), pooled (B, P)


class PromptCache:
    """Rows of prompt embeddings, kept in `directory`, encoded on demand.

    fingerprint: of the encoder's and tokenizer's files, its dtype, its settings (see RowShards).
    load_encoder: called only when a row is missing; the encoder is dropped again before ensure returns, unless
    keep_encoder is set (by whoever meets new prompts all the time).
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
        self.directory, self.fingerprint, self.memory_bytes = Path(directory), fingerprint, memory_bytes
        self.shards = RowShards(directory, fingerprint)
        self.load_encoder = load_encoder
        self.keep_encoder = False
        self._encoder: Encoder | None = None
        self._recent: OrderedDict[str, Row] = OrderedDict()  # oldest first
        self._recent_bytes = 0

    def ensure(self, prompts: Iterable[str]) -> int:
        """Encode the prompts that are not on disk yet. Returns how many that were.

        Looks at each file's header, which tells a torn file; get checks the values too.
        """
        missing = self.shards.missing(prompt for prompt in prompts if prompt not in self._recent)
        if missing:
            self._encode(missing)
        return len(missing)

    def get(self, prompts: Sequence[str], device: torch.device | str, dtype: torch.dtype) -> dict[str, Tensor]:
        """The prompts' rows, stacked: e.g. prompt_embeds (B, L, D), pooled (B, P). Only floats are cast to dtype."""
        if not prompts:
            raise ValueError("PromptCache.get was given no prompts, so there is nothing to stack. Pass at least one.")
        rows = self._rows(prompts)
        stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        there = {name: to_device(values, torch.device(device)) for name, values in stacked.items()}
        return {name: v.to(dtype) if v.is_floating_point() else v for name, v in there.items()}

    def _rows(self, prompts: Sequence[str]) -> list[Row]:
        """One row a prompt; all that are missing are encoded in one go."""
        wanted = list(dict.fromkeys(prompts))
        rows = {prompt: self._recent[prompt] for prompt in wanted if prompt in self._recent}
        self.ensure(wanted)
        rows |= self.shards.read(prompt for prompt in wanted if prompt not in rows)
        if damaged := [prompt for prompt in wanted if prompt not in rows]:
            self._encode(damaged)
            rows |= self.shards.read(damaged)
        if len(rows) < len(wanted):
            raise OSError(f"{self.directory}: a prompt's file cannot be read back after writing it. Check the disk.")
        for prompt in wanted:
            self._remember(prompt, rows[prompt])
        return [rows[prompt] for prompt in prompts]

    def _remember(self, prompt: str, row: Row) -> None:
        """Keep the row in memory while there is room."""
        if prompt not in self._recent:
            self._recent[prompt] = row
            self._recent_bytes += row_bytes(row)
        self._recent.move_to_end(prompt)
        while self._recent_bytes > self.memory_bytes:
            _, oldest = self._recent.popitem(last=False)
            self._recent_bytes -= row_bytes(oldest)

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> None:
        encoder = self._encoder
        if encoder is None:
            logger.info(f"encoding {len(prompts)} prompts into {self.directory}")
            encoder = self.load_encoder()
        if self.keep_encoder:
            self._encoder = encoder
        rows: dict[str, Row] = {}
        try:
            for start in range(0, len(prompts), ENCODE_BATCH):
                batch = prompts[start : start + ENCODE_BATCH]
                found = dict(zip(batch, encode_rows(encoder, batch), strict=True))
                for prompt, row in found.items():
                    check_finite(prompt, row)
                rows |= found
                if len(rows) >= min(SHARD_ROWS, SHARD_BYTES // row_bytes(row)):
                    self.shards.write(rows)
                    rows = {}
        finally:
            if rows:  # whole, also where it was stopped
                self.shards.write(rows)
            if not self.keep_encoder:
                encoder = None
                gc.collect()  # modules hold reference cycles; without this the weights outlive the name
                if torch.cuda.is_initialized():
                    torch.cuda.empty_cache()


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


def too_long(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[str]:
    """The prompts that are longer than the tokenizer's model_max_length (77 for CLIP): their ends are cut off."""
    # in parts: the ids of 100,000 prompts take a gigabyte. verbose=False: transformers would print its own warning
    # about indexing errors, which truncation prevents
    parts = (list(prompts[start : start + TOKENIZE_BATCH]) for start in range(0, len(prompts), TOKENIZE_BATCH))
    lengths = (len(ids) for part in parts for ids in tokenizer(part, truncation=False, verbose=False).input_ids)
    return [p for p, length in zip(prompts, lengths, strict=True) if length > tokenizer.model_max_length]


def warn_too_long(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> int:
    """Says how many they are, and names the first; returns the number."""
    if cut := too_long(tokenizer, prompts):
        such = f"{len(cut)}, such as {cut[0]!r:.80}"
        print(
            f"warning: prompts longer than {tokenizer.model_max_length} tokens: {such}; what lies beyond is not read."
        )
    return len(cut)
