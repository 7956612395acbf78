"""The prompt cache: what is encoded when, the bits of a row, damage and mending."""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import types
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from spo_fast.models import prompt_cache, tensor_cache
from spo_fast.models.prompt_cache import PromptCache, too_long
from spo_fast.models.tensor_cache import fingerprint_files

PROMPTS = [f"prompt {i}" for i in range(11)] + [""]


class ToyEncoder:
    """Values of a prompt depend on its letters and, as with matrix products, on the SHAPE of the batch."""

    def __init__(self, dtype: torch.dtype = torch.float32, sensitive_to_mates: bool = False) -> None:
        self.batches: list[list[str]] = []
        self.dtype, self.sensitive_to_mates = dtype, sensitive_to_mates

    def __call__(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        self.batches.append(prompts)
        codes = torch.tensor([[float(ord(c)) for c in p.ljust(12)[:12]] for p in prompts], dtype=torch.float64)
        embeds = torch.sin(codes[:, :, None] * torch.arange(1, 6)) + 1e-4 * len(prompts)  # (B, 12, 5)
        return {
            "prompt_embeds": embeds.to(self.dtype),
            "pooled": embeds.mean(1).to(self.dtype),
            "length": torch.tensor([len(p) for p in prompts]),
        }


class Loader:
    """Counts how often the encoder is loaded, and shows whether it is still alive."""

    def __init__(self, **settings) -> None:
        self.settings, self.loads, self.batches = settings, 0, []
        self.alive: weakref.ref | None = None

    def __call__(self) -> ToyEncoder:
        self.loads += 1
        encoder = ToyEncoder(**self.settings)
        self.alive, self.batches = weakref.ref(encoder), encoder.batches
        return encoder


def expected(prompt: str, batch_size: int = 8) -> torch.Tensor:
    return ToyEncoder()([prompt] * batch_size)["prompt_embeds"][0]


def test_encodes_once_then_never_loads_the_encoder(tmp_path):
    loader = Loader()
    cache = PromptCache(tmp_path / "cache", "f", loader)
    assert cache.ensure(PROMPTS + PROMPTS[:3]) == 12  # repeats are encoded once
    assert loader.loads == 1
    assert loader.alive() is None  # freed
    assert cache.ensure(PROMPTS) == 0

    again = Loader()
    resumed = PromptCache(tmp_path / "cache", "f", again)
    assert resumed.ensure(PROMPTS) == 0
    rows = resumed.get(PROMPTS, "cpu", torch.float32)
    assert again.loads == 0
    assert torch.equal(rows["prompt_embeds"], torch.stack([expected(p) for p in PROMPTS]))


def test_the_encoder_is_gone_before_cuda_gives_its_memory_back(tmp_path, monkeypatch):
    loader, alive = Loader(), []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append(loader.alive()))
    PromptCache(tmp_path, "f", loader).ensure(["a"])
    assert alive == [None]


def test_only_the_missing_are_encoded(tmp_path):
    PromptCache(tmp_path, "f", Loader()).ensure(PROMPTS[:5])
    loader = Loader()
    assert PromptCache(tmp_path, "f", loader).ensure(PROMPTS) == 7
    assert loader.batches == [PROMPTS[5:] + [""]]


def test_batches_have_a_fixed_size_padded_with_empty_prompts(tmp_path):
    loader = Loader()
    PromptCache(tmp_path, "f", loader).ensure(PROMPTS)
    assert loader.batches == [PROMPTS[:8], [*PROMPTS[8:], "", "", "", ""]]


def test_bits_of_a_row_do_not_depend_on_its_mates(tmp_path):
    assert not torch.equal(expected("prompt 3", 8), expected("prompt 3", 1))  # the toy does feel the batch's shape
    rows = []
    for i, mates in enumerate([["prompt 3"], PROMPTS, PROMPTS[::-1]]):
        cache = PromptCache(tmp_path / str(i), "f", Loader())
        cache.ensure(mates)
        rows.append(cache.get(["prompt 3"], "cpu", torch.float32)["prompt_embeds"])
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2])


def test_get_stacks_in_order_and_casts_floats_only(tmp_path):
    cache = PromptCache(tmp_path, "f", Loader())
    rows = cache.get(["b", "", "b"], "cpu", torch.bfloat16)  # not ensured: encoded now
    assert rows["prompt_embeds"].shape == (3, 12, 5) and rows["pooled"].shape == (3, 5)
    assert rows["prompt_embeds"].dtype == torch.bfloat16
    assert rows["length"].tolist() == [1, 0, 1] and rows["length"].dtype == torch.int64
    assert torch.equal(rows["prompt_embeds"][1], expected("").bfloat16())
    with pytest.raises(ValueError, match="no prompts"):
        cache.get([], "cpu", torch.float32)


def test_bfloat16_rows_survive_the_disk(tmp_path):
    PromptCache(tmp_path, "f", Loader(dtype=torch.bfloat16)).ensure(["a"])
    rows = PromptCache(tmp_path, "f", Loader()).get(["a"], "cpu", torch.bfloat16)
    assert torch.equal(rows["prompt_embeds"][0], expected("a").bfloat16())


def test_fingerprint_separates_encoders(tmp_path):
    PromptCache(tmp_path, "f", Loader()).ensure(["a"])
    loader = Loader()
    assert PromptCache(tmp_path, "g", loader).ensure(["a"]) == 1
    assert PromptCache(tmp_path, "f", loader).ensure(["a"]) == 0


def shards(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*.safetensors"), key=lambda file: file.stat().st_mtime_ns)


def test_files_hold_many_prompts(tmp_path, monkeypatch):
    """As many as fit; the next process and one that is there already find them."""
    beside = PromptCache(tmp_path, "f", Loader())
    assert beside.shards.missing(PROMPTS) == PROMPTS
    PromptCache(tmp_path, "f", Loader()).ensure(f"prompt {i}" for i in range(2000))
    assert len(shards(tmp_path)) == 2
    assert beside.ensure(PROMPTS) == 1 and beside.load_encoder.batches == [[""] * 8]
    one_row = sum(v[0].nbytes for v in ToyEncoder()(["a"]).values())
    monkeypatch.setattr(prompt_cache, "SHARD_BYTES", 16 * one_row)
    PromptCache(tmp_path / "small", "f", Loader()).ensure(f"prompt {i}" for i in range(40))
    assert len(shards(tmp_path / "small")) == 3


def test_a_kill_keeps_what_was_encoded(tmp_path, monkeypatch):
    """Full files stand; what is not written yet goes with the process, or stays if it only stops."""
    one_row = sum(v[0].nbytes for v in ToyEncoder()(["a"]).values())
    monkeypatch.setattr(prompt_cache, "SHARD_BYTES", 16 * one_row)
    cache, met = PromptCache(tmp_path, "f", Loader()), []

    def dies(prompts):
        met.append(prompts)
        if len(met) == 4:
            raise KeyboardInterrupt
        return ToyEncoder()(prompts)

    cache.load_encoder = lambda: dies
    with pytest.raises(KeyboardInterrupt):
        cache.ensure(f"prompt {i}" for i in range(40))
    resumed = PromptCache(tmp_path, "f", Loader())
    assert resumed.ensure(f"prompt {i}" for i in range(40)) == 40 - 3 * 8
    shards(tmp_path)[-1].unlink()
    assert PromptCache(tmp_path, "f", Loader()).ensure(f"prompt {i}" for i in range(40)) == 40 - 3 * 8


@pytest.mark.parametrize("damage", ["torn", "empty", "header", "no list", "flipped byte", "other file"])
def test_a_damaged_file_is_encoded_again(tmp_path, caplog, damage):
    cache = PromptCache(tmp_path, "f", Loader())
    cache.ensure(PROMPTS[:5])
    cache.ensure(PROMPTS)
    path, other = shards(tmp_path)
    content = path.read_bytes()
    with safe_open(path, framework="pt") as file:
        row = file.get_tensor("pooled")[4:5].numpy().tobytes()
    place = content.index(row)
    broken = {
        "torn": content[:-7],
        "empty": b"",
        "header": b"\xff" * 8 + content[8:],
        "no list": content.replace(b'"keys"', b'"yeks"'),
        "flipped byte": content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :],
        "other file": content.replace(b"prompt 4", b"prompt X"),
    }[damage]
    path.write_bytes(broken)

    loader = Loader()
    mended = PromptCache(tmp_path, "f", loader)
    again = {"flipped byte": PROMPTS[4:5], "other file": PROMPTS[4:5]}.get(damage, PROMPTS[:5])
    with caplog.at_level(logging.WARNING):
        # the header shows a torn file at once; changed values show when they are read
        assert mended.ensure(PROMPTS) == {"flipped byte": 0}.get(damage, len(again))
        rows = mended.get(PROMPTS, "cpu", torch.float32)
        made_again = loader.batches
        if damage == "other file":  # its row of a prompt that nobody asked for
            mended.get(["prompt X"], "cpu", torch.float32)
    assert "damaged" in caplog.text and str(path) in caplog.text and str(other) not in caplog.text
    assert torch.equal(rows["prompt_embeds"], torch.stack([expected(p) for p in PROMPTS]))
    assert made_again[0] == again + [""] * (8 - len(again))
    untouched = PromptCache(tmp_path, "f", Loader())  # the row that was made again is the one that counts
    rows = untouched.get(PROMPTS, "cpu", torch.float32)
    assert untouched.load_encoder.loads == 0
    assert torch.equal(rows["prompt_embeds"], torch.stack([expected(p) for p in PROMPTS]))


def test_a_file_that_goes_away_is_made_again(tmp_path):
    cache = PromptCache(tmp_path, "f", Loader())
    cache.ensure(PROMPTS)
    shutil.rmtree(tmp_path)
    rows = cache.get(PROMPTS, "cpu", torch.float32)
    assert torch.equal(rows["prompt_embeds"], torch.stack([expected(p) for p in PROMPTS]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_encoded_again(tmp_path, caplog, monkeypatch, value):
    """Its header and checksum are whole: an earlier version wrote it, this one does not."""
    cache = PromptCache(tmp_path, "f", Loader())
    cache.ensure(["a", "b"])
    row = cache.shards.read(["a"])["a"]
    row["pooled"][3] = value
    with monkeypatch.context() as earlier:
        earlier.setattr("spo_fast.models.tensor_cache.is_finite", lambda row: True)
        PromptCache(tmp_path, "f", Loader()).shards.write({"a": row})
    loader = Loader()
    mended = PromptCache(tmp_path, "f", loader)
    with caplog.at_level(logging.WARNING):
        rows = mended.get(["a", "b"], "cpu", torch.float32)
    assert "it holds a NaN or an infinity" in caplog.text and loader.batches == [["a"] + [""] * 7]
    assert rows["pooled"].isfinite().all() and torch.equal(rows["prompt_embeds"][0], expected("a"))


def test_writes_are_atomic(tmp_path, monkeypatch):
    """Until os.replace the final name does not exist; a failure in between leaves nothing behind."""
    cache = PromptCache(tmp_path, "f", Loader())
    seen = []

    def failing_replace(source, target):
        seen.append((os.path.getsize(source), os.path.exists(target)))
        raise OSError("disk on fire")

    monkeypatch.setattr(tensor_cache.os, "replace", failing_replace)
    with pytest.raises(OSError, match="disk on fire"):
        cache.ensure(["a"])
    assert seen[0][0] > 240 and seen[0][1] is False
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    gc.collect()
    assert cache.load_encoder.alive() is None  # freed on the way out, too

    monkeypatch.undo()
    assert cache.ensure(["a"]) == 1
    with safe_open(shards(tmp_path)[0], framework="pt") as file:
        assert json.loads(file.metadata()["keys"]) == ["a"]


def test_memory_is_bounded_and_used(tmp_path, monkeypatch):
    one_row = sum(v[0].nbytes for v in ToyEncoder()(["a"]).values())
    cache = PromptCache(tmp_path, "f", Loader(), memory_bytes=2 * one_row)
    cache.ensure("abc")
    for prompt in "abac":
        cache.get([prompt], "cpu", torch.float32)
    assert list(cache._recent) == ["a", "c"]  # b was used least recently
    assert cache._recent_bytes == 2 * one_row
    file = shards(tmp_path)[0]
    with monkeypatch.context() as away:
        away.setattr(cache.shards, "read", lambda keys: dict.fromkeys(keys, 1 / 0) if list(keys) else {})
        cache.get(["a"], "cpu", torch.float32)  # from memory
    assert file.exists() and cache.load_encoder.loads == 1
    rows = cache.get(["a", "b", "c"], "cpu", torch.float32)  # more than fits
    assert torch.equal(rows["prompt_embeds"], torch.stack([expected(p) for p in "abc"]))
    assert cache._recent_bytes <= 2 * one_row


def test_a_caller_cannot_change_the_rows_in_memory(tmp_path):
    cache = PromptCache(tmp_path, "f", Loader())
    cache.get(["a"], "cpu", torch.float32)["prompt_embeds"].zero_()
    assert torch.equal(cache.get(["a"], "cpu", torch.float32)["prompt_embeds"][0], expected("a"))


def test_encoder_with_a_wrong_batch_dimension(tmp_path):
    cache = PromptCache(tmp_path, "f", lambda: lambda prompts: {"pooled": torch.zeros(3, 4)})
    with pytest.raises(ValueError, match=r"pooled of shape \(3, 4\) for 8 prompts"):
        cache.ensure(["a"])


def test_encoding_records_no_gradient(tmp_path):
    weight = torch.ones(3, requires_grad=True)
    grad_enabled = []

    def encode(prompts):
        grad_enabled.append(torch.is_grad_enabled())  # a graph of the encoders would cost gigabytes
        return {"pooled": weight.expand(8, 3) * 2}

    cache = PromptCache(tmp_path, "f", lambda: encode)
    assert cache.ensure(["a"]) == 1 and grad_enabled == [False]
    assert not cache.get(["a"], "cpu", torch.float32)["pooled"].requires_grad


def test_fingerprint_files(tmp_path):
    def make(folder: str, name: str, content: bytes):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_bytes(content)
        return tmp_path / folder / name

    a = make("text_encoder", "model.safetensors", b"a" * 3_000_000)
    b = make("text_encoder_2", "model.safetensors", b"b")
    whole = fingerprint_files([a, b])
    assert len(whole) == 64
    assert whole == fingerprint_files([b, a])
    others = [fingerprint_files([a])]
    for content in (b"x" + b"a" * 2_999_999, b"a" * 2_999_999 + b"x", b"a" * 3_000_001, b""):
        others.append(fingerprint_files([make("text_encoder", "model.safetensors", content), b]))
    large = make("unet", "model.safetensors", bytes(40_000_000))
    others.append(fingerprint_files([large]))
    with large.open("r+b") as file:  # one layer of a network, a hundredth of it
        file.seek(20_000_000)
        file.write(b"x" * 400_000)
    others.append(fingerprint_files([large]))
    make("text_encoder", "model.safetensors", b"b")
    make("text_encoder_2", "model.safetensors", b"a" * 3_000_000)
    others.append(fingerprint_files([a, b]))  # the two encoders changed places
    assert len({whole, *others}) == 1 + len(others)


def test_too_long_with_a_clip_tokenizer(tmp_path, caplog):
    from transformers import CLIPTokenizer

    letters = "abcdefgh"
    vocab = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path, model_max_length=6)
    # start + 4 words + end = 6 fits, one word more does not
    assert too_long(tokenizer, ["a b c d", "a b c d e", "", "a b c d e f g h"]) == ["a b c d e", "a b c d e f g h"]
    assert too_long(tokenizer, []) == []
    assert "longer than" not in caplog.text


def test_too_long_asks_for_no_truncation():
    def tokenize(prompts, truncation, verbose):
        assert truncation is False and verbose is False
        return types.SimpleNamespace(input_ids=[[0] * len(p) for p in prompts])

    tokenize.model_max_length = 3
    assert too_long(tokenize, ["abc", "abcd"]) == ["abcd"]
