"""Where the toy's files live: made once, in a cache directory of this user."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path


def cache_dir() -> Path:
    """$SPO_FAST_CACHE, or ~/.cache/spo_fast."""
    return Path(os.environ.get("SPO_FAST_CACHE") or Path.home() / ".cache" / "spo_fast")


def toy_files() -> tuple[Path, Path]:
    """(pipeline directory, step-aware preference model file) of the toy, made on first use."""
    from spo_fast.scorers import make_tiny_spm
    from spo_fast.toy.pipeline import make_toy_pipeline, toy_directory

    directory = make_toy_pipeline(toy_directory(cache_dir()))
    spm = directory.with_name(f"{directory.name}-spm")
    if not (spm / "config.json").is_file():
        text = json.loads((directory / "text_encoder" / "config.json").read_text())
        draft = spm.with_name(f".{spm.name}-{os.getpid()}")
        make_tiny_spm(draft, vocab_size=text["vocab_size"], max_length=text["max_position_embeddings"])
        try:
            os.rename(draft, spm)
        except OSError:
            if not (spm / "config.json").is_file():  # else another process was first, with the same weights
                raise
            shutil.rmtree(draft)
    return directory, spm / "model.safetensors"
