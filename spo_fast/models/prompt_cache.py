"""Prompt embeddings on disk: every prompt is encoded once, then the text encoders leave memory.

SDXL's two text encoders take 1.6 GB in 16 bits and would run again each epoch for rows that never change. One small
safetensors file a prompt (0.3 MB for SDXL in 16 bits) makes the cache shareable between runs and processes.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spo_fast.method.experience import to_device
from spo_fast.models.tensor_cache import Row, RowCache

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Prompts always travel in batches of this size, the last padded with empty prompts: matrix products sum in an order
# that depends on the batch's shape, so with a fixed shape a row's bits do not depend on which prompts share its batch.
ENCODE_BATCH = 8

Encoder = Callable[[list[str]], dict[str, Tensor]]  # B prompts -> e.g. prompt_embeds (B, L, D), pooled (B, P)


class PromptCache(RowCache):
    """Rows of prompt embeddings, kept in `directory`, encoded on demand.

    fingerprint: of the encoder's and tokenizer's files, its dtype, its settings (see RowCache).
    load_encoder: called only when a row is missing; the encoder is dropped again before ensure returns, unless
    keep_encoder is set (by whoever meets new prompts all the time).
    The empty prompt "" (the unconditional one) is an ordinary entry.
    """

    def __init__(
        self,
        directory: str | Path,
        fingerprint: str,
        load_encoder: Callable[[], Encoder],
        memory_bytes: int = 256 << 20,
    ) -> None:
        super().__init__(directory, fingerprint, memory_bytes)
        self.load_encoder = load_encoder
        self.keep_encoder = False
        self._encoder: Encoder | None = None

    def ensure(self, prompts: Iterable[str]) -> int:
        """Encode the prompts that are not on disk yet. Returns how many that were.

        Looks at each file's header, which tells a torn file; get checks the values too.
        """
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._recent]
        missing = [prompt for prompt in missing if not self.is_whole(prompt)]
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
        rows = {prompt: self.read(prompt) for prompt in dict.fromkeys(prompts)}
        missing = [prompt for prompt, row in rows.items() if row is None]
        if missing:
            self._encode(missing)
            rows |= {prompt: self.read(prompt) for prompt in missing}
        whole = {prompt: row for prompt, row in rows.items() if row is not None}
        if len(whole) < len(rows):
            raise OSError(f"{self.directory}: a prompt's file cannot be read back after writing it. Check the disk.")
        for prompt, row in whole.items():
            self.remember(prompt, row)
        return [whole[prompt] for prompt in prompts]

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> None:
        encoder = self._encoder
        if encoder is None:
            logger.info(f"encoding {len(prompts)} prompts into {self.directory}")
            encoder = self.load_encoder()
        if self.keep_encoder:
            self._encoder = encoder
        try:
            for start in range(0, len(prompts), ENCODE_BATCH):
                batch = prompts[start : start + ENCODE_BATCH]
                for prompt, row in zip(batch, encode_rows(encoder, batch), strict=True):
                    self.write(prompt, row)
        finally:
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


def count_truncated(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> int:
    """How many prompts are longer than the tokenizer's model_max_length (77 for CLIP): their ends are cut off."""
    # verbose=False: transformers would print its own warning about indexing errors, which truncation prevents
    if not prompts:
        return 0  # transformers cannot tokenize an empty list
    lengths = (len(ids) for ids in tokenizer(list(prompts), truncation=False, verbose=False).input_ids)
    return sum(length > tokenizer.model_max_length for length in lengths)
