"""The CLIP tokenizer without the hub: byte-pair merges shipped with the package, the vocabulary derived from them."""

from __future__ import annotations

import gzip
import inspect
import json
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MERGES = Path(__file__).parent / "configs" / "clip_bpe" / "merges.txt.gz"
START, END = "<|startoftext|>", "<|endoftext|>"


def clip_tokenizer(
    pad_token: str = END, max_length: int = 77, merges: Collection[tuple[str, str]] | None = None
) -> PreTrainedTokenizerBase:
    """The published CLIP tokenizer (49,408 tokens), from the merges shipped with this package.

    pad_token is the end token for CLIP ViT-L and "!" (id 0) for the second encoder of SDXL.
    merges: others than the published ones; with none at all each byte is a token (514 tokens).
    """
    from transformers import CLIPTokenizerFast  # type: ignore[attr-defined]  # an alias in transformers 5

    merges = list(clip_merges() if merges is None else merges)
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad_token}
    if "vocab" in inspect.signature(CLIPTokenizerFast.__init__).parameters:  # transformers 5
        # which takes vocab_file= as well, and then quietly knows two tokens only
        return CLIPTokenizerFast(vocab=clip_vocab(merges), merges=merges, model_max_length=max_length, **special)
    with tempfile.TemporaryDirectory() as folder:
        vocab_file, merges_file = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocab_file.write_text(json.dumps(clip_vocab(merges)))
        merges_file.write_text("\n".join(["#version: 0.2", *(f"{a} {b}" for a, b in merges), ""]), encoding="utf-8")
        return CLIPTokenizerFast(str(vocab_file), str(merges_file), model_max_length=max_length, **special)


def clip_merges() -> list[tuple[str, str]]:
    """The 48,894 byte-pair merges, first one first; source and licence in configs/clip_bpe/NOTICE.txt."""
    text = gzip.decompress(MERGES.read_bytes()).decode()
    return [(a, b) for a, b in (line.split() for line in text.splitlines())]


def clip_vocab(merges: Collection[tuple[str, str]]) -> dict[str, int]:
    """Token to id: the 256 bytes, the same ending a word, one token a merge, start, end."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    # bytes without a glyph of their own stand at 256, 257, ... in the order of their values
    glyphs = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = glyphs + [g + "</w>" for g in glyphs] + [a + b for a, b in merges] + [START, END]
    return {token: i for i, token in enumerate(tokens)}
