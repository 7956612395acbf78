"""Preference pairs: what is read, what is refused and why, and that a stream goes on exactly where it stopped."""

from __future__ import annotations

import collections
import csv
import io
import itertools
import json
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from spo_fast.data import images, pair_rows, pair_stream
from spo_fast.data.images import decode_image, to_square
from spo_fast.data.pair_rows import BadRowError, BadRows
from spo_fast.data.pair_sources import open_pairs
from spo_fast.data.pair_stream import PairStream, shuffled, split_by_prompt

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def picture(value: int, size: tuple[int, int] = (4, 4)) -> bytes:
    return encode(Image.new("RGB", size, (value % 256, value // 256 % 256, 7)))


IMAGES = [picture(i) for i in range(64)]


def columns(n: int, first: int = 0, **replaced) -> dict[str, list]:
    """n rows; row i is about prompt i // 3, its image 0 tells i, its label cycles through win, loss, tie."""
    numbers = range(first, first + n)
    made = {
        "caption": [f"prompt {i // 3}" for i in numbers],
        "jpg_0": [picture(i) for i in numbers],
        "jpg_1": [IMAGES[i % 64] for i in numbers],
        "label_0": [(1.0, 0.0, 0.5)[i % 3] for i in numbers],
        "label_1": [(0.0, 1.0, 0.5)[i % 3] for i in numbers],
        "num_example_per_prompt": [3] * n,
    }
    return {name: values for name, values in (made | replaced).items() if values is not None}


def write_parquet(path: Path, data: dict, group: int = 5) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(data), path, row_group_size=group)
    return path


@pytest.fixture
def bad(tmp_path) -> BadRows:
    return BadRows(tmp_path / "run" / "bad_rows.jsonl", limit=1.0)


@pytest.fixture
def shards(tmp_path) -> Path:
    """60 rows in 3 files, 12 row groups of 5."""
    for i in range(3):
        write_parquet(tmp_path / "data" / f"part-{i}.parquet", columns(20, 20 * i))
    return tmp_path / "data"


def row_number(row: pair_rows.Row) -> int:
    """What `columns` hid in image 0."""
    r, g, _ = decode_image(row.image(0)).getpixel((0, 0))
    return r + 256 * g


def write_table(folder: Path, name: str = "pairs.jsonl", n: int = 6) -> list[dict]:
    """A folder of n rows; returns them as written."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for i in range(n):
        for j in range(2):
            (folder / f"{i}_{j}.png").write_bytes(picture(i))
        label = (1, 0, 0.5)[i % 3]
        records.append(
            {"prompt": f'a "prompt", {i // 2}', "image_0": f"{i}_0.png", "image_1": f"{i}_1.png"}
            | {"label_0": label, "label_1": 1 - label, "num_example_per_prompt": 2}
        )
    path = folder / name
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(records)
    return records


# ---- what is read ----


def check_rows(source, numbers) -> None:
    rows = source.read(np.arange(len(source)))
    assert [row_number(row) for row in rows] == list(numbers)
    assert [row.prompt for row in rows] == [f"prompt {i // 3}" for i in numbers]
    assert [row.label for row in rows] == [(1.0, 0.0, 0.5)[i % 3] for i in numbers]
    assert all(row.weight == pytest.approx(1 / 3) for row in rows)
    assert rows[0].image(1) == IMAGES[numbers[0] % 64]


def test_parquet_folder_and_file(shards, bad):
    source = open_pairs(str(shards), bad)
    check_rows(source, range(60))
    assert source.blocks.tolist() == [i // 5 for i in range(60)] and source.blocks.dtype == np.int32
    assert source.prompt_hash.dtype == np.uint64 and len(set(source.prompt_hash.tolist())) == 20
    assert source.read([7])[0].where == "part-0.parquet, row 8"
    check_rows(open_pairs(str(shards / "part-1.parquet"), bad), range(20, 40))
    assert len(bad) == 0 and not bad.path.exists()


def test_structs_categories_and_other_number_types(tmp_path, bad):
    data = columns(9)
    for name in ("jpg_0", "jpg_1"):
        data[name] = [{"bytes": value, "path": None} for value in data[name]]
    data["caption"] = pa.array(data["caption"]).dictionary_encode()
    data["label_0"] = [str(value) for value in data["label_0"]]
    data["label_1"] = pa.array(np.array(data["label_1"], np.float16))
    check_rows(open_pairs(str(write_parquet(tmp_path / "a.parquet", data)), bad), range(9))


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.csv", "pairs.TSV"])
@pytest.mark.parametrize("given", ["folder", "file"])
def test_folder(tmp_path, bad, name, given):
    records = write_table(tmp_path / "d", name)
    source = open_pairs(str(tmp_path / "d" if given == "folder" else tmp_path / "d" / name), bad)
    rows = source.read([4, 1, 2])
    assert [row_number(row) for row in rows] == [4, 1, 2]
    assert [row.prompt for row in rows] == [records[i]["prompt"] for i in (4, 1, 2)]
    assert [(row.label, row.weight) for row in rows] == [(0.0, 0.5), (0.0, 0.5), (0.5, 0.5)]
    assert rows[0].where == f"{name}, line {5 if name.endswith('l') else 6}"


def test_csv_with_line_breaks_byte_order_mark_and_blank_lines(tmp_path, bad):
    write_table(tmp_path)
    content = '\ufeffcaption,image_0,image_1,label_0,label_1\r\n"two\r\nlines",0_0.png,0_1.png,1,0\r\n\r\n'
    (tmp_path / "p.csv").write_bytes((content + "Zürich 夜,1_0.png,1_1.png,0,1").encode())
    source = open_pairs(tmp_path / "p.csv", bad)
    rows = source.read([1, 0])
    assert [(row.prompt, row.label, row.weight, row.where) for row in rows] == [
        ("Zürich 夜", 0.0, 1.0, "p.csv, line 5"),
        ("two\r\nlines", 1.0, 1.0, "p.csv, line 3"),
    ]


def test_caption_column(tmp_path, bad):
    path = write_parquet(tmp_path / "a.parquet", columns(3, caption=None, note=["a", " b ", "c"]))
    rows = open_pairs(str(path), bad, caption_column="note").read([0, 1, 2])
    assert [row.prompt for row in rows] == ["a", "b", "c"]


def test_rows_without_a_label(tmp_path, bad):
    """has_label false: kept for training while its labels are valid, else left out without being a fault."""
    data = columns(7, label_0=[1.0, None, 0.5, 1.0, 9.0, None, 0.5], label_1=[0.0, None, 0.5, 0.0, 0.0, 1.0, 0.5])
    data["caption"][6] = " "
    data["has_label"] = [True, False, False, None, False, True, False]
    source = open_pairs(str(write_parquet(tmp_path / "a.parquet", data)), bad)
    assert [row_number(row) for row in source.read(range(len(source)))] == [0, 2, 3]
    assert source.labelled.tolist() == [True, False, False] and source.unlabelled == 2
    assert bad.reasons == {"a.parquet, row 6": "label_0 is missing", "a.parquet, row 7": "the prompt is empty"}


def test_hub_through_a_file_system(tmp_path, bad, caplog, capsys):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.store.clear()

    def upload(path, data):
        memory.pipe(path, write_parquet(tmp_path / "upload", data).read_bytes())

    upload("datasets/owner/name/data/validation-00000-of-00001.parquet", columns(5, 50))
    for i in range(2):
        upload(f"datasets/owner/name/data/train-0000{i}-of-00002.parquet", columns(10, 10 * i))
    source = open_pairs("owner/name", bad, filesystem=memory)
    check_rows(source, range(20))  # the training split only, and that is said
    assert source.read([12])[0].where == "data/train-00001-of-00002.parquet, row 3"
    assert "owner/name: reading 2 of 3 files, train: data/train-00000" in capsys.readouterr().out
    upload("datasets/owner/name@refs%2Fpr%2F1/x.parquet", columns(4))
    check_rows(open_pairs("owner/name", bad, revision="refs/pr/1", filesystem=memory), range(4))
    # no parquet of its own: the hub's conversion
    memory.pipe("datasets/owner/other/README.md", b"#")
    upload("datasets/owner/other@~parquet/default/train/0000.parquet", columns(6))
    check_rows(open_pairs("owner/other", bad, filesystem=memory), range(6))
    assert "conversion" in caplog.text
    for spec, revision in (("owner/none", None), ("owner/other", "v1")):
        with pytest.raises(FileNotFoundError, match=f"{spec}: no such local path, and no parquet files on the hub"):
            open_pairs(spec, bad, revision=revision, filesystem=memory)
    memory.store.clear()


def test_hub_offline(bad):
    class Down:
        def find(self, path):
            raise RuntimeError("name resolution failed")

    with pytest.raises(ConnectionError, match="owner/name: no such local path, .*name resolution failed.*download"):
        open_pairs("owner/name", bad, filesystem=Down())


# ---- bad data: one clear error, or one named and counted row ----


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims this size and holds next to nothing."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    end = b"IEND"
    chunks = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, end))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


BAD_PARQUET_ROWS = {
    "null prompt": ({"caption": None}, "the prompt is missing"),
    "empty prompt": ({"caption": ""}, "the prompt is empty"),
    "blank prompt": ({"caption": " \n\u3000"}, "the prompt is empty"),
    "null label": ({"label_0": None}, "label_0 is missing"),
    "nan label": ({"label_1": float("nan")}, "labels 1 and nan are not two shares within"),
    "label out of range": ({"label_0": 2.0, "label_1": -1.0}, "labels 2 and -1 are not two shares within"),
    "labels both won": ({"label_0": 1.0, "label_1": 1.0}, "add up to 1"),
    "null count": ({"num_example_per_prompt": None}, "num_example_per_prompt is missing"),
    "count zero": ({"num_example_per_prompt": 0}, "num_example_per_prompt is 0, not a number of at least 1"),
}
BAD_PARQUET_IMAGES = {
    "null image": (None, "jpg_1 is missing"),
    "empty image": (b"", r"the image is empty \(0 bytes\)"),
    "not an image": (b"<html>404</html>", "not an image of a known format"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image of a known"),
    "truncated png": (picture(1, (64, 64))[:-40], r"the image cannot be decoded"),
    "truncated jpeg": (encode(Image.effect_noise((64, 64), 90), "JPEG")[:-300], r"cannot be decoded \(OSError"),
    "decompression bomb": (png_header(1 << 16, 1 << 16), r"cannot be decoded \(DecompressionBombError"),
    "larger than allowed": (png_header(8193, 8192), "the image has 8193 x 8192 pixels"),
    "zero size": (png_header(0, 8), "image"),
    "a path to nothing": ({"bytes": None, "path": "1.jpg"}, "jpg_1 '1.jpg' is not a file"),
    "neither bytes nor path": ({"bytes": None, "path": None}, "jpg_1 is missing"),
    "floating point": (encode(Image.new("F", (4, 4)), "TIFF"), "floating-point numbers"),
}


@pytest.mark.parametrize("kind", BAD_PARQUET_ROWS)
def test_bad_parquet_row(tmp_path, bad, kind):
    change, reason = BAD_PARQUET_ROWS[kind]
    data = columns(7)
    for name, value in change.items():
        data[name][3] = value
    source = open_pairs(str(write_parquet(tmp_path / "a.parquet", data)), bad)
    assert [row_number(row) for row in source.read(range(len(source)))] == [0, 1, 2, 4, 5, 6]
    assert list(bad.reasons) == ["a.parquet, row 4"] and reason in bad.reasons["a.parquet, row 4"]


def test_bad_parquet_rows_by_column_type(tmp_path, bad):
    """Faults that need another type of column: numbers in words, bytes that are not UTF-8, prompts that are numbers."""
    words = ["1.0", "best", "0.5"]
    open_pairs(str(write_parquet(tmp_path / "a.parquet", columns(3, label_0=words, label_1=["0", "1", "0.5"]))), bad)
    raw = pa.array([b"a", b"caf\xe9", b"c"]).view(pa.string())
    source = open_pairs(str(write_parquet(tmp_path / "b.parquet", columns(3, caption=raw))), bad)
    assert [row.prompt for row in source.read([0, 1])] == ["a", "c"]
    with pytest.raises(ValueError, match="none of the 3 rows is usable.*row 2: .*prompt is 5, not text"):
        numbers = write_parquet(tmp_path / "c.parquet", columns(3, caption=[4, 5, 6]))
        open_pairs(str(numbers), BadRows(tmp_path / "c.jsonl", 1.0))
    assert bad.reasons == {
        "a.parquet, row 2": "label_0 is 'best', not a number",
        "b.parquet, row 2": "the prompt is not valid Unicode",
    }


@pytest.mark.parametrize("kind", BAD_PARQUET_IMAGES)
def test_bad_image(tmp_path, bad, kind):
    value, reason = BAD_PARQUET_IMAGES[kind]
    data = columns(7)
    data["jpg_1"][3] = value
    if isinstance(value, dict):
        data["jpg_1"] = [
            image if isinstance(image, dict) else {"bytes": image, "path": None} for image in data["jpg_1"]
        ]
    source = open_pairs(str(write_parquet(tmp_path / "a.parquet", data)), bad)
    with stream(
        source, bad, batch_size=3, epochs=1, load=lambda row: (row_number(row), decode_image(row.image(1)))
    ) as s:
        assert sorted(number for batch in s for number, _ in batch.loaded) == [0, 1, 2, 4, 5, 6]
    assert list(bad.reasons) == ["a.parquet, row 4"]
    with pytest.raises(BadRowError, match=reason):
        decode_image(source.read([3])[0].image(1))


BAD_JSON_LINES = {
    "torn": ('{"prompt": "a", "image_0": "0_', "not JSON"),
    "nested without end": ("[" * 100_000, "not JSON"),
    "array": ('["a", "0_0.png"]', "a JSON list, not an object"),
    "name twice": ('{"prompt": "a", "prompt": "b"}', "a name stands twice"),
    "prompt is a number": ({"prompt": 7}, "the prompt is 7, not text"),
    "lone surrogate": ({"prompt": "\ud800"}, "the prompt is not valid Unicode"),
    "no label": ({"label_1": None}, "label_1 is missing"),
    "label in words": ({"label_0": "left"}, "label_0 is 'left', not a number"),
    "label too large": ({"label_0": 10**400}, "label_0 is 1000"),
    "infinite count": ({"num_example_per_prompt": float("inf")}, "is inf, not a number of at least 1"),
    "null image": ({"image_0": None}, "image_0 is missing"),
    "image is a list": ({"image_1": ["1_0.png"]}, "image_1 is ['1_0.png'], not a path"),
    "absolute path": ({"image_0": "/etc/hostname"}, "'/etc/hostname' leaves the table's folder"),
    "drive": ({"image_0": "C:\\a.png"}, "leaves the table's folder"),
    "parent folder": ({"image_0": "sub/../../x.png"}, "leaves the table's folder"),
    "backslashed parent": ({"image_0": "..\\x.png"}, "leaves the table's folder"),
    "zero byte": ({"image_0": "a\0.png"}, "not a path"),
}
BAD_CSV_LINES = {
    "too few fields": ("a,0_0.png", "2 fields where the header has 6"),
    "too many fields": ("a, b,0_0.png,0_1.png,1,0,1", "7 fields where the header has 6"),
    "empty label": ("a,0_0.png,0_1.png,,1,1", "label_0 is '', not a number"),
    "empty image": ("a,,0_1.png,0,1,1", "image_0 is missing"),
}


@pytest.mark.parametrize("kind", [*BAD_JSON_LINES, *BAD_CSV_LINES])
def test_bad_table_line(tmp_path, bad, kind):
    line, reason = (BAD_JSON_LINES | BAD_CSV_LINES)[kind]
    name = "pairs.jsonl" if kind in BAD_JSON_LINES else "pairs.csv"
    records = write_table(tmp_path / "d", name)
    path = tmp_path / "d" / name
    lines = path.read_text().splitlines()
    lines.insert(3, line if isinstance(line, str) else json.dumps(records[0] | line))
    path.write_text("\n".join(lines))
    source = open_pairs(str(path), bad)
    assert len(source) == 6 and list(bad.reasons) == [f"{name}, line 4"]
    assert reason in bad.reasons[f"{name}, line 4"]
    numbers = [0, 1, 2, 3, 4, 5]
    assert [row_number(row) for row in source.read(range(6))] == numbers


def test_bad_files_of_a_folder_are_met_when_read(tmp_path, bad):
    folder = tmp_path / "d"
    write_table(folder)
    (tmp_path / "outside.png").write_bytes(IMAGES[0])
    for i in range(5):
        (folder / f"{i}_0.png").unlink()
    (folder / "1_0.png").symlink_to(tmp_path / "outside.png")
    (folder / "2_0.png").symlink_to("2_0.png")
    (folder / "3_0.png").mkdir()
    (folder / "4_0.png").symlink_to("4_1.png")  # a link that stays inside is fine
    source = open_pairs(str(folder), bad)
    with stream(source, bad, batch_size=8, epochs=1) as batches:
        assert sorted(number for batch in batches for number in batch.loaded) == [4, 5]
    reasons = [bad.reasons[f"pairs.jsonl, line {line}"] for line in (1, 2, 3, 4)]
    for reason, words in zip(reasons, ("is not a file", "through a link", "", "is not a file"), strict=True):
        assert "image_0" in reason and words in reason


def test_a_pipe_is_not_waited_for(tmp_path, bad):
    import os

    write_table(tmp_path)
    (tmp_path / "0_0.png").unlink()
    os.mkfifo(tmp_path / "0_0.png")
    with pytest.raises(BadRowError, match="is not a file"):
        open_pairs(str(tmp_path), bad).read([0])[0].image(0)


def replace(text: str, new: str):
    return lambda path: path.write_text(path.read_text().replace(text, new))


WHOLE_FILE_FAULTS = {
    "missing columns": ("a.parquet", columns(3, jpg_1=None, label_0=None), "no column jpg_1, label_0; found caption,"),
    "no caption": ("a.parquet", columns(3, caption=None), "no column caption or prompt; found jpg_0"),
    "no parquet rows": ("a.parquet", pa.table(columns(3)).slice(0, 0), "no rows in it"),
    "no usable row": ("a.parquet", columns(3, label_1=[7.0] * 3), r"none of the 3 rows is usable: 3 are bad \(a.par"),
    "none labelled": (
        "a.parquet",
        columns(3, label_1=[None] * 3) | {"has_label": [False] * 3},
        "none of the 3 rows is usable: .*, 3 have no label",
    ),
    "not parquet": ("a.parquet", b"PAR1 is only the beginning", "a.parquet: cannot be read as parquet"),
    "empty parquet": ("a.parquet", b"", "a.parquet: cannot be read as parquet"),
    "empty jsonl": ("a.jsonl", b"\n\n", "a.jsonl: no rows in it"),
    "empty csv": ("a.csv", b"", "a.csv: no rows in it"),
    "csv without a header": ("a.csv", b"a cat,0.png,1.png,1,0\n", "no column caption or prompt, image_0"),
    "csv column twice": ("a.csv", b"prompt,image_0,image_1,label_0,label_1,label_0\n", "column label_0 stands there"),
    "csv open quote": (
        "a.csv",
        b'prompt,image_0,image_1,label_0,label_1\n"a cat,0.png,1.png,1,0\nb,0,1,1,0\n',
        "from line 2 on: unexpected end of data. Mend the quoting",
    ),
    "jsonl without images": (
        "a.jsonl",
        b'{"prompt": "a", "label_0": 1}',
        "line 1: no column image_0, image_1, label_1",
    ),
    "utf-16": ("a.jsonl", '{"prompt": "a"}'.encode("utf-16"), "a.jsonl: not UTF-8"),
    "latin-1": ("a.csv", "prompt,café\n".encode("latin-1"), "a.csv: not UTF-8"),
    "unknown extension": ("a.json", b"[]", r"a.json: found neither. Give a .parquet file or .*.jsonl"),
}


@pytest.mark.parametrize("kind", WHOLE_FILE_FAULTS)
def test_whole_file_fault(tmp_path, bad, kind):
    name, content, message = WHOLE_FILE_FAULTS[kind]
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        write_parquet(path, content)
    else:
        pq.write_table(content, path)
    with pytest.raises(ValueError, match=message):
        open_pairs(str(path), bad)


def test_torn_parquet_and_torn_row_group(tmp_path, bad):
    path = write_parquet(tmp_path / "a.parquet", columns(20))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="a.parquet: cannot be read as parquet.*download it again"):
        open_pairs(str(path), bad)
    path.write_bytes(whole)
    source = open_pairs(str(path), bad)
    path.write_bytes(whole[:4] + bytes(len(whole) // 2) + whole[4 + len(whole) // 2 :])
    with pytest.raises(ValueError, match="a.parquet: cannot be read as parquet"):
        source.read([0])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "found neither. Give a .parquet file"),
        (["a.txt"], "found neither"),
        (["a.jsonl", "b.csv"], r"found a.jsonl, b.csv\. Give"),
        (["a.jsonl", "sub/b.parquet"], "found a.jsonl, b.parquet"),
    ],
)
def test_unclear_folder(tmp_path, bad, files, message):
    for name in files:
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_bytes(b"")
    (tmp_path / "d").mkdir(exist_ok=True)
    with pytest.raises(ValueError, match=message):
        open_pairs(str(tmp_path / "d"), bad)


@pytest.mark.parametrize("spec", ["nowhere", "data/pairs.jsonl", "a/b/c", "../nowhere", "owner/name.parquet", "a b/c"])
def test_no_such_thing_names_the_three_forms(bad, spec):
    with pytest.raises(FileNotFoundError, match=r"a .parquet file or a folder.*a table.*the hub \(owner/name\)"):
        open_pairs(spec, bad)


def test_local_path_has_no_revision(shards, bad):
    with pytest.raises(ValueError, match="revision='main' is for data sets on the hub"):
        open_pairs(str(shards), bad, revision="main")


def test_without_pyarrow(shards, bad, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    for spec in (str(shards), "owner/name"):
        with pytest.raises(ImportError, match=r"pip install 'spo_fast\[data\]'"):
            open_pairs(spec, bad)


# ---- bad rows on record ----


def test_bad_rows_are_written_once_and_read_back(tmp_path):
    path = tmp_path / "run" / "bad_rows.jsonl"
    first = BadRows(path, 0.5)
    assert not path.parent.exists()
    first.add("a, row 1", "no “prompt”")
    first.add("a, row 1", "no “prompt”")
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"row": "a, row 1", "reason": "no “prompt”"}
    ]
    with path.open("a") as file:
        file.write('{"row": "a, row 2", "rea')  # what a crash leaves
    again = BadRows(path, 0.5)
    assert again.reasons == first.reasons
    again.add("a, row 1", "no “prompt”")
    again.add("a, row 2", "late")
    assert [json.loads(line)["row"] for line in path.read_text().splitlines()] == ["a, row 1", "a, row 2"]
    path.write_text("hello\n")
    with pytest.raises(ValueError, match="bad_rows.jsonl: not a file of bad rows"):
        BadRows(path, 0.5)


def test_bad_rows_limit(tmp_path):
    bad = BadRows(tmp_path / "bad_rows.jsonl", 0.02)
    for i in range(3):
        bad.add(f"row {i}", f"reason {i}")
    bad.check(99)
    bad.check(150)  # 2 % is not above the limit
    with pytest.raises(ValueError, match=r"3 of 149 rows .*2\.0%; .*2\.0%.*row 0: reason 0;.*bad_rows.jsonl names"):
        bad.check(149)
    with pytest.raises(ValueError, match="3 of 10 rows"):
        bad.check(10, final=True)
    bad.check(0, final=True)


def test_limit_stops_the_index_pass_and_the_stream(tmp_path):
    data = columns(300)
    for i in range(0, 300, 10):
        data["caption"][i] = ""
    path = write_parquet(tmp_path / "a.parquet", data)
    with pytest.raises(ValueError, match=r"30 of 300 rows are unusable .*the prompt is empty"):
        open_pairs(str(path), BadRows(tmp_path / "a.jsonl", 0.09))
    data = columns(300)
    data["jpg_0"][::4] = [None] * 75
    source = open_pairs(str(write_parquet(path, data)), BadRows(tmp_path / "b.jsonl", 0.1))
    for _ in range(2):  # a restart that knows the bad rows stops as well
        bad = BadRows(tmp_path / "b.jsonl", 0.1)
        with pytest.raises(ValueError, match=r"25 of 100 rows are unusable"):
            list(stream(source, bad, epochs=1, shuffle=False))
    assert len(bad) == 25


# ---- order ----


def fake_source(blocks, block_bytes=0, hashes=None, labelled=None):
    blocks = np.asarray(blocks, np.int32)
    return SimpleNamespace(
        blocks=blocks,
        block_bytes=np.full(blocks.max() + 1, block_bytes, np.int64),
        prompt_hash=np.arange(len(blocks), dtype=np.uint64) if hashes is None else np.asarray(hashes, np.uint64),
        labelled=np.ones(len(blocks), bool) if labelled is None else np.asarray(labelled),
        __len__=None,
    )


class Source(SimpleNamespace):
    def __len__(self):
        return len(self.blocks)


def test_shuffle_permutes_and_keeps_row_groups_together():
    source = Source(**vars(fake_source(np.repeat(np.arange(40), 25))))
    indices = np.flatnonzero(np.arange(1000) % 7)
    order = shuffled(source, indices, seed=3, epoch=0, window_rows=100)
    assert sorted(order) == indices.tolist()
    # each window of at most 100 rows is some whole row groups: a row group never comes back once left
    positions = collections.defaultdict(list)
    for position, block in enumerate(source.blocks[order].tolist()):
        positions[block].append(position)
    assert max(max(p) - min(p) for p in positions.values()) < 100
    spread = [max(p) - min(p) + 1 - len(p) for p in positions.values()]
    assert np.mean(np.array(spread) > 20) > 0.9  # and rows of a window are mixed
    blocks_in_order = list(dict.fromkeys(source.blocks[order].tolist()))
    assert np.mean(np.abs(np.array(blocks_in_order) - np.arange(40))) > 5  # row groups too
    assert np.array_equal(order, shuffled(source, indices[::-1], 3, 0, 100))
    for seed, epoch in ((4, 0), (3, 1)):
        assert not np.array_equal(order, shuffled(source, indices, seed, epoch, 100))


def test_windows_are_bounded_in_bytes():
    source = Source(**vars(fake_source(np.repeat(np.arange(10), 5), block_bytes=pair_stream.WINDOW_BYTES // 2)))
    for key in ((0, 0), None):
        order, ends = pair_stream.windows_of(source, np.arange(50), 8192, key)
        assert ends == [10, 20, 30, 40, 50]
        assert all(len(set(source.blocks[order[end - 10 : end]])) == 2 for end in ends)


def test_split_by_prompt():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 3000, dtype=np.uint64).repeat(3)
    labelled = rng.random(9000) < 0.8
    source = Source(**vars(fake_source(np.zeros(9000, int), hashes=hashes, labelled=labelled)))
    train, validation = split_by_prompt(source, 0.1, seed=5)
    assert not set(hashes[train]) & set(hashes[validation])
    assert labelled[validation].all() and not labelled[train].all()
    dropped = np.setdiff1d(np.arange(9000), np.concatenate([train, validation]))
    assert len(dropped) and not labelled[dropped].any()  # would leak: their prompts validate
    assert len(set(hashes) - set(hashes[train])) == pytest.approx(300, abs=3 * np.sqrt(3000 * 0.09))
    # a function of (seed, prompt): other rows around it change nothing
    half = Source(**vars(fake_source(np.zeros(4500, int), hashes=hashes[::2], labelled=labelled[::2])))
    assert set(split_by_prompt(half, 0.1, 5)[0].tolist()) == {i // 2 for i in train.tolist() if i % 2 == 0}
    assert set(split_by_prompt(source, 0.1, 6)[1]) != set(validation)
    everything, nothing = split_by_prompt(source, 0, 5)
    assert len(everything) == 9000 and len(nothing) == 0
    one = Source(**vars(fake_source([0, 0], hashes=[7, 7])))
    for share in (0.01, 0.99):
        with pytest.raises(ValueError, match="leaves one side empty. Change --validation_share"):
            split_by_prompt(one, share, 0)
    with pytest.raises(ValueError, match="share=1"):
        split_by_prompt(source, 1, 0)


# ---- streams ----


def stream(source, bad, batch_size=4, load=row_number, seed=1, **options) -> PairStream:
    return PairStream(
        source, options.pop("indices", np.arange(len(source))), batch_size, load, bad, seed=seed, **options
    )


def take(batches, n: int) -> list:
    return [
        (b.loaded, b.prompts, b.labels.tolist(), b.weights.tolist(), b.position) for b in itertools.islice(batches, n)
    ]


def test_batches_hold_labels_weights_and_prompts(shards, bad):
    with stream(open_pairs(str(shards), bad), bad, batch_size=7, epochs=1) as batches:
        got = list(batches)
    assert [len(batch.loaded) for batch in got] == [7] * 8 + [4]
    assert [batch.position for batch in got] == [*range(7, 57, 7), 60]
    assert sorted(number for batch in got for number in batch.loaded) == list(range(60))
    for batch in got:
        assert batch.labels.dtype == batch.weights.dtype == torch.float32
        assert batch.labels.tolist() == [(1.0, 0.0, 0.5)[i % 3] for i in batch.loaded]
        assert batch.weights.tolist() == pytest.approx([1 / 3] * len(batch.loaded))
        assert batch.prompts == [f"prompt {i // 3}" for i in batch.loaded]


@pytest.fixture
def faulty(tmp_path, bad):
    """50 rows, 6 of them with images that do not decode."""
    data = columns(50)
    for i in (0, 9, 10, 11, 12, 49):
        data["jpg_0"][i] = b"damaged"
    return open_pairs(str(write_parquet(tmp_path / "faulty.parquet", data)), bad)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("window_rows", [8192, 12])
def test_resume_is_exact_with_bad_rows_and_across_epochs(faulty, bad, monkeypatch, shuffle, window_rows):
    monkeypatch.setattr(pair_stream, "WINDOW_ROWS", window_rows)
    with stream(faulty, bad, shuffle=shuffle) as batches:
        whole = take(batches, 40)  # 160 of 44 usable rows: more than three epochs
    assert all(len(batch[0]) == 4 for batch in whole)
    assert any(
        batch[-1] % 50 and (batch[-1] - 1) // 50 > (before[-1] - 1) // 50 for before, batch in itertools.pairwise(whole)
    )
    numbers = [number for batch in whole for number in batch[0]]
    assert sorted(numbers[:44]) == sorted(numbers[44:88]) == [i for i in range(50) if i not in (0, 9, 10, 11, 12, 49)]
    assert (numbers[:44] == numbers[44:88]) == (not shuffle)
    lines = bad.path.read_text()
    assert len(lines.splitlines()) == 6
    for done in (1, 7, 11, 12, 25):
        resumed_bad = BadRows(bad.path, 1.0)
        workers = 1 + done % 5
        with stream(
            faulty, resumed_bad, shuffle=shuffle, position=whole[done - 1][-1], workers=workers, prefetch=1 + done % 3
        ) as batches:
            assert take(batches, 10) == whole[done : done + 10]
    assert bad.path.read_text() == lines


def test_finite_epochs_and_resume_at_their_end(faulty, bad):
    with stream(faulty, bad, batch_size=10, epochs=2) as batches:
        got = take(batches, 99)
    assert [len(batch[0]) for batch in got] == [10] * 8 + [8]
    for position, rest in ((got[6][-1], 2), (100, 0), (1000, 0)):
        with stream(faulty, bad, batch_size=10, epochs=2, position=position) as batches:
            assert take(batches, 99) == got[len(got) - rest :]


def test_order_does_not_depend_on_how_long_loading_takes(shards, bad):
    gate = threading.Event()

    def slow_first(row):
        number = row_number(row)
        if number == 0:
            assert gate.wait(30)
        elif number == 5:
            gate.set()  # a later row ends before the first one does
        return number

    with stream(open_pairs(str(shards), bad), bad, load=slow_first, shuffle=False, epochs=1) as batches:
        assert [number for batch in batches for number in batch.loaded] == list(range(60))


def test_every_row_group_is_read_once_a_window(shards, bad, monkeypatch):
    reads = []
    original = pq.ParquetFile.read_row_group

    def counted(file, group, *args, **kwargs):
        reads.append((file.metadata.row_group(0).column(0).file_path, group))
        return original(file, group, *args, **kwargs)

    source = open_pairs(str(shards), bad)
    assert not reads  # the index pass reads no image
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    monkeypatch.setattr(pair_stream, "WINDOW_ROWS", 20)
    list(stream(source, bad, epochs=1))
    assert len(reads) == 12
    reads.clear()
    list(stream(source, bad, epochs=1, indices=np.arange(0, 60, 10)))  # one row of every second group
    assert len(reads) == 6
    reads.clear()
    with stream(source, bad, prefetch=1) as batches:
        next(batches)
    assert len(reads) <= 8  # the window in use and the one read ahead


def test_index_pass_leaves_the_images_on_disk(tmp_path, bad, monkeypatch):
    heavy = columns(20, jpg_0=[bytes([i]) * 100_000 for i in range(20)])
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(heavy), path, row_group_size=5, compression="none", use_dictionary=False)
    fetched = []

    class Counting:
        def find(self, root):
            return [f"{root}/a.parquet"]

        def open(self, name, mode, **options):
            file = path.open(mode)
            read = file.read
            counted = SimpleNamespace(
                closed=False, readable=lambda: True, seekable=lambda: True, writable=lambda: False
            )
            counted.seek, counted.tell, counted.mode = file.seek, file.tell, mode
            counted.close, counted.flush = file.close, lambda: None
            counted.read = lambda n=-1: (data := read(n), fetched.append(len(data)))[0]
            return Context(counted)

    class Context:
        def __init__(self, file):
            self.__dict__.update(vars(file))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.close()

    source = open_pairs("owner/name", bad, filesystem=Counting())
    assert sum(fetched) < 100_000  # of 2 MB
    fetched.clear()
    assert source.read([7])[0].image(0) == bytes([7]) * 100_000
    assert 500_000 < sum(fetched) < 700_000  # one row group


def test_load_runs_at_most_prefetch_batches_ahead(shards, bad):
    started = []

    def load(row):
        started.append(row.where)
        return 0

    with stream(open_pairs(str(shards), bad), bad, load=load, prefetch=2) as batches:
        next(batches)
        assert 4 <= len(started) <= 4 + 2 * 4


def test_errors_of_load_reach_the_consumer_and_threads_end(shards, bad):
    before = threading.active_count()

    def load(row):
        if row_number(row) == 13:
            raise ZeroDivisionError("a bug in load")
        return 0

    batches = stream(open_pairs(str(shards), bad), bad, load=load, shuffle=False)
    assert next(batches).position == 4 and threading.active_count() > before
    with pytest.raises(ZeroDivisionError, match="a bug in load"):
        list(batches)
    assert threading.active_count() == before
    with stream(open_pairs(str(shards), bad), bad) as batches:
        next(batches)
    assert threading.active_count() == before and list(batches) == []
    assert len(bad) == 0


def test_errors_of_reading_reach_the_consumer(shards, bad):
    source = open_pairs(str(shards), bad)
    (shards / "part-1.parquet").write_bytes(b"gone")
    with pytest.raises(ValueError, match="part-1.parquet: cannot be read as parquet"):
        list(stream(source, bad, epochs=1))


def test_epoch_without_a_usable_row(faulty, bad):
    indices = np.array([0, 10, 11])
    for epochs in (1, None):
        with pytest.raises(ValueError, match=r"none of an epoch's 3 rows is usable \(faulty.parquet, row 1: not an im"):
            list(stream(faulty, bad, indices=indices, epochs=epochs))
    # entered at its end, an epoch may have nothing left; the next one has
    with stream(faulty, bad, indices=np.array([1, 2, 9]), shuffle=False, position=2, batch_size=2) as batches:
        assert next(batches).loaded == [1, 2]


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"indices": []}, {"position": -1}, {"workers": 0}])
def test_wrong_arguments(faulty, bad, wrong):
    with pytest.raises(ValueError, match="must be at least 1, position=-?[0-9]+ at least 0"):
        stream(faulty, bad, **wrong)


# ---- images ----


def pixel(data: bytes) -> tuple:
    image = decode_image(data)
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


def test_images_become_rgb():
    assert pixel(encode(Image.new("L", (3, 3), 9))) == (9, 9, 9)
    assert pixel(encode(Image.new("1", (3, 3), 1))) == (255, 255, 255)
    assert pixel(encode(Image.new("RGBA", (3, 3), (10, 20, 30, 255)))) == (10, 20, 30)
    assert pixel(encode(Image.new("RGBA", (3, 3), (10, 20, 30, 0)))) == (255, 255, 255)
    assert pixel(encode(Image.new("RGBA", (3, 3), (0, 0, 0, 51)))) == (204, 204, 204)  # 255 (1 - 51/255)
    assert pixel(encode(Image.new("LA", (3, 3), (40, 255)))) == (40, 40, 40)
    assert pixel(encode(Image.new("RGB", (3, 3), (1, 2, 3)), transparency=(1, 2, 3))) == (255, 255, 255)
    palette = Image.new("P", (3, 3), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert pixel(encode(palette)) == (10, 20, 30)
    assert pixel(encode(palette, transparency=1)) == (255, 255, 255)
    deep = Image.fromarray(np.full((3, 3), 0xABCD, np.uint16))
    assert pixel(encode(deep)) == (0xAB, 0xAB, 0xAB)
    r, g, b = pixel(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    assert r > 250 and g < 5 and b < 5
    frames = [Image.new("RGB", (3, 3), color) for color in ("red", "blue")]
    assert pixel(encode(frames[0], "GIF", save_all=True, append_images=frames[1:])) == (255, 0, 0)


@pytest.mark.parametrize("size", [(40, 40), (97, 61), (33, 80), (512, 63), (20, 21)])
def test_to_square_is_what_clip_does(size):
    try:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    except ModuleNotFoundError:  # transformers 4
        from transformers import CLIPImageProcessor as CLIPImageProcessorPil

    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 40}, crop_size={"height": 40, "width": 40}, do_normalize=False, do_convert_rgb=False
    )
    expected = processor(Image.fromarray(noise), return_tensors="pt")["pixel_values"][0]
    got = to_square(Image.fromarray(noise), 40)
    assert got.dtype == torch.float32 and got.is_contiguous() and got.min() >= -1 and got.max() <= 1
    check_values(got, expected * 2 - 1)


def check_values(got: torch.Tensor, expected: torch.Tensor, exact: bool = False) -> None:
    """Of 8 bits, in [-1, 1]: apart by 1 of 255 in fewer than 1 of 100, by 2 in fewer than 1 of 1000; exact: nowhere."""
    steps = (got - expected).abs() * 127.5
    assert not exact or steps.max() < 1e-4
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
    assert steps.max() < 2.5 and (steps > 1.5).float().mean() < 1e-3 and (steps > 0.5).float().mean() < 1e-2


@pytest.mark.parametrize("resizer", ["PyTorch", "Pillow"])
@pytest.mark.parametrize(
    ("size", "to"),
    [((61, 97), 40), ((60, 150), 40), ((300, 403), 224), ((403, 300), 224), ((512, 512), 224), ((96, 128), 160)],
)
def test_to_square_is_pillows_resize_width_first(size, to, resizer, monkeypatch):
    """As every Pillow has it in two calls; in one, 13 takes the height of the very upright one first."""
    monkeypatch.setattr(images, "RESIZER", resizer)
    rng = np.random.default_rng(3)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))  # what is smooth, and what clips
    texture = rng.integers(-40, 40, (size[1], size[0], 1))
    image = Image.fromarray((np.array(coarse.resize(size)) + texture).clip(0, 255).astype(np.uint8))
    width, height = (to * side // min(size) for side in size)
    whole = image.resize((width, size[1]), Image.Resampling.BICUBIC).resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - to) // 2, (height - to) // 2
    expected = np.asarray(whole)[top : top + to, left : left + to].transpose(2, 0, 1) / 127.5 - 1
    check_values(to_square(image, to), torch.from_numpy(expected).float(), exact=resizer == "Pillow")


def test_to_square_leaves_an_image_of_that_size_alone(monkeypatch):
    values = np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    image = Image.fromarray(values)
    monkeypatch.setattr(images.F, "interpolate", None)
    monkeypatch.setattr(images, "RESIZER", "PyTorch")
    expected = torch.from_numpy(values.transpose(2, 0, 1) / 255 * 2 - 1).float()
    torch.testing.assert_close(to_square(image, 16), expected, rtol=0, atol=1e-6)


def test_to_square_refuses_a_stripe():
    with pytest.raises(BadRowError, match="1 x 40: more than 32 times"):
        to_square(Image.new("RGB", (1, 40)), 16)


# ---- size ----

MILLION = """
import sys, pathlib
import numpy as np, torch
from spo_fast.data.images import decode_image, to_square
from spo_fast.data.pair_rows import BadRows
from spo_fast.data.pair_sources import open_pairs
from spo_fast.data.pair_stream import PairStream, split_by_prompt
import pyarrow.parquet

folder = pathlib.Path(sys.argv[1])
def peak_kib():  # ru_maxrss would begin with the peak of the process that started this one
    return int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
status = pathlib.Path("/proc/self/status").read_text()
before = int(status.split("VmRSS:")[1].split()[0])
source = open_pairs(str(folder / "data"), bad := BadRows(folder / "bad.jsonl", 0.01))
indexed = peak_kib()
train, validation = split_by_prompt(source, 0.75, 0)
streamed, total = 0, 0.0
load = lambda row: to_square(decode_image(row.image(0)), 4)
for batch in PairStream(source, train, 256, load, bad, seed=0, epochs=1):
    streamed += len(batch.loaded)
    total += float(torch.stack(batch.loaded).mean())
peak = peak_kib()
print(len(source), len(train), streamed, len(bad), (indexed - before) // 1024, (peak - before) // 1024)
"""


def write_rows(data: Path, rows: int, files: int = 8) -> Path:
    """A directory of small rows, three to a prompt, made in chunks."""
    data.mkdir()
    for i in range(files):
        with pq.ParquetWriter(data / f"part-{i}.parquet", pa.table(columns(1)).schema) as writer:
            for start in range(0, rows // files, 5000):
                count = min(5000, rows // files - start)
                numbers = range(i * rows // files + start, i * rows // files + start + count)
                images = [IMAGES[k % 64] for k in numbers]
                chunk = columns(0) | {
                    "caption": [
                        f"prompt {k // 3}, which goes on for about as long as people's prompts" for k in numbers
                    ],
                    "jpg_0": images,
                    "jpg_1": images,
                    "label_0": [1.0] * count,
                    "label_1": [0.0] * count,
                    "num_example_per_prompt": [3] * count,
                }
                writer.write_table(pa.table(chunk, schema=pa.table(columns(1)).schema), row_group_size=500)
    return data


@pytest.fixture(scope="module")
def million(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("million") / "data", 1_000_000)


@pytest.mark.slow
def test_a_million_rows_in_little_memory(million, tmp_path):
    """Indexes 10^6 rows and streams an epoch of a quarter of them, in a process of its own."""
    (tmp_path / "data").symlink_to(million)
    out = subprocess.run([sys.executable, "-c", MILLION, tmp_path], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr[-2000:]
    indexed, train, streamed, bad, index_mib, peak_mib = map(int, out.stdout.splitlines()[-1].split())
    print(
        f"{indexed} rows indexed in {index_mib} MiB, {streamed} streamed at a peak of {peak_mib} MiB over the imports"
    )
    assert indexed == 1_000_000 and bad == 0 and streamed == train >= 200_000
    assert peak_mib < 1024


TRAIN = """
import sys
from spo_fast import train_spm
assert train_spm.main(sys.argv[1:]) == 0
print("peak_kib", int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]))
"""


@pytest.mark.slow
def test_training_on_a_million_rows_takes_hardly_more_memory_than_on_a_thousand(million, tmp_path):
    """The whole trainer with the toy's model, in a process of its own each: what the data adds to the model."""
    few = write_rows(tmp_path / "few", 1000, files=1)
    peaks = {}
    for name, data in (("few", few), ("million", million)):
        line = ["--model", "toy", "--pairs", str(data), "--output_dir", str(tmp_path / name), "--max_train_steps", "30"]
        line += ["--train_batch_size", "16", "--max_validation_pairs", "16", "--validation_timesteps", "0"]
        out = subprocess.run([sys.executable, "-c", TRAIN, *line], capture_output=True, text=True, check=False)
        assert out.returncode == 0, out.stderr[-2000:]
        peaks[name] = int(out.stdout.split("peak_kib")[1]) // 1024
    print(f"peak of a training on 1,000 rows {peaks['few']} MiB, on 1,000,000 rows {peaks['million']} MiB")
    assert peaks["million"] - peaks["few"] < 1024
