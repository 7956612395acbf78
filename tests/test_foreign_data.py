"""Data of other people: split names, pictures as cameras and scanners leave them, paths in place of bytes, comments."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from runs import run_toy

from spo_fast.data.images import decode_image
from spo_fast.data.pair_rows import BadRowError, BadRows
from spo_fast.data.pair_sources import open_pairs
from spo_fast.data.prompts import TOY_PROMPTS, load_prompts
from spo_fast.data.splits import files_of, splits_of

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402


@pytest.fixture
def bad(tmp_path: Path) -> BadRows:
    return BadRows(tmp_path / "bad.jsonl", 1.0)


# ------------------------------------------------------------------------------------------------- split names

# each checked once against datasets 5.2 (get_data_patterns): files of train, validation, test; the rest is in none
SPLITS: dict[str, tuple[list[str], list[str], list[str], list[str]]] = {
    "plain": (["train.x"], ["validation.x"], ["test.x"], []),
    "shards": (["train_000.x", "train_001.x"], [], ["test_000.x"], []),
    "digits": (["train0.x"], [], ["test0.x"], []),
    "behind": (["pairs_train.x"], [], ["pairs_test.x"], []),
    "hyphens": (["training-0.x"], ["validation-0.x"], [], []),
    "spaces and dots": (["my train 1.x", "a.train.b.x"], ["x dev.x"], ["eval 2.x"], []),
    "other keywords": (["training.x"], ["valid.x", "val.x", "dev.x"], ["testing.x", "eval.x", "evaluation.x"], []),
    "within words": (["untrained.x", "contest.x", "latest.x", "trainset.x", "Train.x", "device.x"], [], [], []),
    "one keyword and others": (["a/train.x"], [], [], ["other.x", "trainset.x"]),
    "folders": (["train/0.x", "train/deep/1.x"], ["val/0.x"], ["test/0.x"], ["0.x"]),
    "folders first": ([], [], ["test/train.x"], ["train.x"]),
    "folders with more": (["my_train/0.x", "train-2/0.x"], ["dev.1/0.x"], ["eval 3/0.x"], []),
    "the hub's conversion": (["default/train/0000.x"], ["default/partial-validation/0.x"], [], []),
    "data/": (["data/train-00000-of-00001.x"], ["data/validation-00000-of-00001.x"], [], ["train.x"]),
    "of a hash": (["data/train-00000-of-00001-abc.x"], [], ["data/test-00000-of-00001-abc.x"], []),
    "hidden": (["b.x"], [], [], [".train.x", ".cache/train.x", "__pycache__/train.x"]),
    "both": (["train_test.x"], [], ["train_test.x", "test.x"], []),
    "no split": (["a.x", "b/c.x"], [], [], []),
}


@pytest.mark.parametrize("case", SPLITS)
def test_splits_are_the_hubs(case: str) -> None:
    *splits, rest = SPLITS[case]
    names = ("train", "validation", "test")
    want = {name: sorted(files) for name, files in zip(names, splits, strict=True) if files}
    assert splits_of({file for files in (*splits, rest) for file in files}) == want


def test_what_is_taken_and_left_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    files = ["train_000.x", "train_001.x", "test_000.x", "val.x", "README.x", ".train.x"]
    assert files_of("here", files, "train") == ["train_000.x", "train_001.x"]
    assert capsys.readouterr().out == (
        "here: reading 2 of 6 files, train: train_000.x, train_001.x; left: 1 validation, 1 test, 2 of no split\n"
    )
    assert files_of("here", files, "validation") == ["val.x"]
    assert "reading 1 of 6 files, validation: val.x; left: 2 train, 1 test" in capsys.readouterr().out
    assert files_of("here", ["b.x", "a.x"], "train") == ["a.x", "b.x"]
    assert capsys.readouterr().out == "here: reading all 2 files, train: a.x, b.x\n"
    assert files_of("here", ["a.x"], "train") == ["a.x"] and capsys.readouterr().out == ""
    pickapic = [f"data/{name}-00000-of-00001.x" for name in ("train_unique", "validation_unique", "test_unique")]
    assert (
        files_of("here", pickapic, "train") == pickapic[:1]
        and files_of("here", pickapic, "validation") == pickapic[1:2]
    )
    assert "train_unique: data/train_unique" in capsys.readouterr().out
    assert files_of("here", ["test.x"], "validation") == files_of("here", ["test.x", "train.x"], "validation")
    for lone in (["test.x", "val.x"], ["test.x"], ["test/train.x"], [".train.x"]):
        with pytest.raises(ValueError, match=r"^here: no train split .*Give the file") as caught:
            files_of("here", lone, "train")
        assert len(str(caught.value)) <= 290


def png(color: Any, size: tuple[int, int] = (4, 4), kind: str = "png", mode: str = "RGB", **options: Any) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size, color).save(out, kind, **options)
    return out.getvalue()


def write_pairs(path: Path, prompt: str, images: Any = None, rows: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [images or png("red")] * rows
    columns = {"caption": [prompt] * rows, "jpg_0": images, "jpg_1": images, "label_0": [1.0] * rows}
    pq.write_table(pa.table(columns | {"label_1": [0.0] * rows}), path)


def prompts_of(folder: Path, bad: BadRows, split: str = "train") -> set[str]:
    source = open_pairs(folder, bad, split=split)
    return {row.prompt for row in source.read(range(len(source)))}


@pytest.mark.parametrize(
    ("train", "other"),
    [("train_000", "test_000"), ("train0", "test0"), ("pairs_train", "pairs_test"), ("training-0", "validation-0"),
     ("train/a", "eval/a"), ("data/train-00000-of-00001", "data/validation_unique-00000-of-00001")],
)  # fmt: skip
def test_folders_of_pairs(tmp_path: Path, bad: BadRows, train: str, other: str) -> None:
    write_pairs(tmp_path / "d" / f"{train}.parquet", "to train on")
    write_pairs(tmp_path / "d" / f"{other}.parquet", "to hold out")
    assert prompts_of(tmp_path / "d", bad) == {"to train on"}
    assert prompts_of(tmp_path / "d", bad, "validation") == {"to hold out"}
    assert prompts_of(tmp_path / "d" / f"{other}.parquet", bad) == {"to hold out"}  # named, so meant


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv"])
@pytest.mark.parametrize(("train", "other"), [("train", "test"), ("train/metadata", "test/metadata")])
def test_folders_of_images(tmp_path: Path, bad: BadRows, suffix: str, train: str, other: str) -> None:
    names = ("prompt", "image_0", "image_1", "label_0", "label_1")
    for table, prompt in ((train, "to train on"), (other, "to hold out")):
        path = tmp_path / "d" / f"{table}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "a.png").write_bytes(png("red"))
        values = (prompt, "a.png", "a.png", "1", "0")
        between = {".csv": ",", ".tsv": "\t"}.get(suffix)
        line = json.dumps(dict(zip(names, values, strict=True)))
        path.write_text("\n".join(map(between.join, (names, values))) if between else line)
    assert prompts_of(tmp_path / "d", bad) == {"to train on"}
    source = open_pairs(tmp_path / "d", bad, split="validation")
    (row,) = source.read([0])
    assert row.prompt == "to hold out" and row.image(0) == png("red")


def test_two_tables_of_one_split_are_refused(tmp_path: Path, bad: BadRows) -> None:
    for name in ("train_0.jsonl", "train_1.jsonl", "test.jsonl"):
        (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=r"found train_0.jsonl, train_1.jsonl\. Give"):
        open_pairs(tmp_path, bad)


def test_a_folder_of_prompts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a cat")
    with pytest.raises(ValueError, match="cannot read prompts"):
        load_prompts(tmp_path)


# ------------------------------------------------------------------------------------------------- pictures

CORNERS = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[255, 255, 0], [0, 255, 255], [255, 0, 255]]], np.uint8)
# orientation (EXIF 2.32, tag 274: where row 0 and column 0 of what is stored are shown) -> what is seen
SEEN = {
    1: CORNERS,
    2: CORNERS[:, ::-1],
    3: CORNERS[::-1, ::-1],
    4: CORNERS[::-1],
    5: CORNERS.transpose(1, 0, 2),
    6: CORNERS[::-1].transpose(1, 0, 2),
    7: CORNERS[::-1, ::-1].transpose(1, 0, 2),
    8: CORNERS[:, ::-1].transpose(1, 0, 2),
}


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [*SEEN, 0, 9, 77])
def test_pictures_are_turned_as_viewers_show_them(kind: str, orientation: int) -> None:
    exif, out = Image.Exif(), io.BytesIO()
    exif[274] = orientation
    Image.fromarray(CORNERS).save(out, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    assert np.array_equal(np.asarray(decode_image(out.getvalue())), SEEN.get(orientation, CORNERS))


def test_a_turned_photograph_and_damaged_exif() -> None:
    exif = Image.Exif()
    exif[274] = 6
    assert decode_image(png("red", (8, 4), "JPEG", exif=exif)).size == (4, 8)
    assert decode_image(png("red", (8, 4), "JPEG", exif=b"Exif\0\0nonsense")).size == (8, 4)
    cut = exif.tobytes()[:-9]
    assert decode_image(png("red", (8, 4), "JPEG", exif=cut)).getpixel((0, 0))[0] > 250


def of_array(values: np.ndarray, kind: str) -> bytes:
    out = io.BytesIO()
    Image.fromarray(values).save(out, kind)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_cut_to_eight(kind: str) -> None:
    image = decode_image(of_array(np.full((3, 3), 0xABCD, np.uint16), kind))
    assert image.mode == "RGB" and image.getpixel((1, 1)) == (0xAB, 0xAB, 0xAB)


def clear_png(depth: int, color_type: int, samples: list[int], clear: list[int]) -> bytes:
    """One row of pixels, and the value that is transparent (PNG specification, 11.3.2.1: at the file's own depth)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    bits = "".join(f"{sample:0{depth}b}" for sample in samples)
    bits += "0" * (-len(bits) % 8)
    row = b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")
    width = len(samples) // len(clear)
    head = struct.pack(">IIBBBBB", width, 1, depth, color_type, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"tRNS", struct.pack(f">{len(clear)}H", *clear)), (b"IDAT", zlib.compress(row)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in (*chunks, (b"IEND", b"")))


@pytest.mark.parametrize(
    ("depth", "samples", "clear", "seen"),
    [
        (1, [0, 1], [0], [255, 255]),
        (2, [0, 1, 2, 3], [1], [0, 255, 170, 255]),
        (4, [0, 7, 15], [7], [0, 255, 255]),
        (8, [7, 8], [7], [255, 8]),
        (16, [0x1234, 0x1235, 0xABCD], [0x1234], [255, 0x12, 0xAB]),
        (8, [7, 8, 9, 7, 8, 10], [7, 8, 9], [(255, 255, 255), (7, 8, 10)]),
        (16, [0x1234, 0x5678, 0x9ABC, 0, 1, 2], [0x1234, 0x5678, 0x9ABC], [(255, 255, 255), (0, 0, 0)]),
    ],
)
def test_a_transparent_value_shows_white(depth: int, samples: list[int], clear: list[int], seen: list[Any]) -> None:
    image = decode_image(clear_png(depth, 2 if len(clear) == 3 else 0, samples, clear))
    want = np.array([seen] if len(clear) == 3 else [[(v, v, v) for v in seen]])
    assert np.array_equal(np.asarray(image), want)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.full((3, 3), 200, np.int32), "32-bit or signed numbers, whose range is not known"),
        (np.full((3, 3), 2**31 - 1, np.int32), "32-bit or signed"),
        (np.full((3, 3), 0.5, np.float32), "floating-point numbers"),
        (np.full((3, 3), 200.0, np.float32), "floating-point numbers"),
    ],
)
def test_wider_numbers_are_refused(values: np.ndarray, words: str) -> None:
    with pytest.raises(BadRowError, match=words):
        decode_image(of_array(values, "TIFF"))


# ------------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize("value", [{"bytes": None, "path": "images/a.png"}, "images/a.png"])
def test_a_path_in_place_of_bytes_is_read(tmp_path: Path, bad: BadRows, value: Any) -> None:
    """Relative to its parquet file, which may lie in a subfolder."""
    write_pairs(tmp_path / "d" / "deep" / "a.parquet", "a cat", value)
    (tmp_path / "d" / "deep" / "images").mkdir()
    (tmp_path / "d" / "deep" / "images" / "a.png").write_bytes(png("blue"))
    for spec in (tmp_path / "d", tmp_path / "d" / "deep" / "a.parquet"):
        assert open_pairs(spec, bad).read([0])[0].image(1) == png("blue")


def test_an_absolute_path_within_the_folder_is_read(tmp_path: Path, bad: BadRows) -> None:
    write_pairs(tmp_path / "d" / "a.parquet", "a cat", {"bytes": None, "path": str((tmp_path / "d/a.png").resolve())})
    (tmp_path / "d" / "a.png").write_bytes(png("blue"))
    assert open_pairs(tmp_path / "d", bad).read([0])[0].image(0) == png("blue")


@pytest.mark.parametrize(
    ("path", "words"),
    [("gone.png", "is not a file"), ("../out.png", "leaves the"), ("/etc/hostname", "leaves the"), ("", "is missing")],
)
def test_paths_that_are_not_read(tmp_path: Path, bad: BadRows, path: str, words: str) -> None:
    (tmp_path / "out.png").write_bytes(png("blue"))
    write_pairs(tmp_path / "d" / "a.parquet", "a cat", {"bytes": None, "path": path})
    with pytest.raises(BadRowError, match=words):
        open_pairs(tmp_path / "d", bad).read([0])[0].image(0)


def test_bytes_come_before_their_path(tmp_path: Path, bad: BadRows) -> None:
    write_pairs(tmp_path / "d" / "a.parquet", "a cat", {"bytes": png("red"), "path": "/elsewhere/a.png"})
    assert open_pairs(tmp_path / "d", bad).read([0])[0].image(0) == png("red")


def test_paths_on_the_hub_are_not_followed(tmp_path: Path, bad: BadRows) -> None:
    memory = pytest.importorskip("fsspec").filesystem("memory")
    memory.store.clear()
    write_pairs(tmp_path / "a.parquet", "a cat", {"bytes": None, "path": "a.png"})
    memory.pipe("datasets/owner/name/a.parquet", (tmp_path / "a.parquet").read_bytes())
    with pytest.raises(BadRowError, match="of data on the hub the parquet files must hold the images"):
        open_pairs("owner/name", bad, filesystem=memory).read([0])[0].image(0)


# ------------------------------------------------------------------------------------------------- prompts, resuming


def test_comments_among_prompts_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "p.txt"
    file.write_text("a cat\n#1 dad, a mug\n\n# a comment\n #2 mum, a mug\n")
    assert load_prompts(file) == ["a cat", "#2 mum, a mug"]
    text = capsys.readouterr().out
    assert "begin with # are comments, 2 of them skipped (the first is line 2)" in text and "a space before" in text
    for name, content in (
        ("p.json", '["#1 dad"]'),
        ("p.jsonl", '{"caption": "#1 dad"}'),
        ("p.csv", "caption\n#1 dad\n"),
    ):
        (tmp_path / name).write_text(content)
        assert load_prompts(tmp_path / name) == ["#1 dad"] and capsys.readouterr().out == ""


def test_the_toys_own_comments_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert load_prompts(TOY_PROMPTS) and load_prompts(None) and capsys.readouterr().out == ""


def test_a_resumed_run_with_nothing_left_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_toy(tmp_path / "run", max_train_steps=1)
    assert "nothing is left" not in capsys.readouterr().out
    run_toy(tmp_path / "run", max_train_steps=1, resume_from_checkpoint="latest")
    assert "nothing is left to train: the run is 1 iterations (--max_train_steps" in capsys.readouterr().out
    run_toy(tmp_path / "run", max_train_steps=2, resume_from_checkpoint="latest")
    assert "nothing is left" not in capsys.readouterr().out
