"""Preference pairs (two images, a prompt, a label) of data larger than memory, for training a preference model.

What stays in memory is an index of 30 bytes a row: where the row lies and a hash of its prompt. Images are read by
window: a window is some whole parquet row groups (PairStream holds one and reads the next ahead), its rows are permuted
and each of its row groups is read once. An epoch's order is a pure function of (seed, epoch), so the position in the
data is one integer, and a resumed stream yields exactly the batches that the interrupted one would have.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import logging
import re
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any, BinaryIO, Generic, Protocol, TypeVar
from urllib.parse import quote

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from spo_fast import noise
from spo_fast.config import RunError
from spo_fast.files import reason_of
from spo_fast.splits import files_of

logger = logging.getLogger(__name__)

PROMPT_COLUMNS = ("caption", "prompt")  # the first one present is read
LABEL_COLUMNS = ("label_0", "label_1")
COUNT_COLUMN, HAS_LABEL_COLUMN = "num_example_per_prompt", "has_label"
DELIMITERS = {".jsonl": None, ".csv": ",", ".tsv": "\t"}  # the tables a folder of images may have
WINDOW_ROWS = 8192
WINDOW_BYTES = 512 << 20  # of images: Pick-a-Pic's 8192 rows would be 3 GB
INDEX_BATCH = 4096  # rows held as Python objects while indexing
MIN_SEEN = 100  # rows before a share of bad ones means anything
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # not EPS: Pillow would start Ghostscript
MAX_PIXELS = 1 << 26  # 8192 x 8192: 200 MB decoded, in each worker
MAX_ASPECT = 32

T = TypeVar("T")


class BadRowError(ValueError):
    """One row is unusable; the message is the reason."""


class LabelError(BadRowError):
    """Its labels are: no fault in a row that says it has none."""


class BadRows:
    """The rows left out, each once, in a file of JSON lines {"row": where, "reason": reason}.

    path: made at the first bad row. An existing file is read, so a resumed run neither recounts nor rewrites a row.
    limit: the share of bad rows above which `check` stops the run.
    """

    def __init__(self, path: Path, limit: float) -> None:
        self.path, self.limit = Path(path), limit
        self.reasons: dict[str, str] = {}  # by row, in order of discovery
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        try:
            for line in whole.splitlines():
                entry = json.loads(line)
                self.reasons[entry["row"]] = entry["reason"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path}: not a file of bad rows ({error!r}). Move it away.") from error
        if len(whole) < len(content):  # a crash tore the last line: the row is found again, and its line goes here
            with self.path.open("r+b") as file:
                file.truncate(len(whole))

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, where: str, reason: str) -> None:
        if where in self.reasons:
            return
        self.reasons[where] = reason
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:  # closed, so flushed, at once
            file.write(json.dumps({"row": where, "reason": reason}) + "\n")

    def check(self, seen: int, count: int | None = None, *, final: bool = False) -> None:
        """Raises RunError when more than `limit` of the rows seen are bad.

        count: bad ones among the `seen`; None: all in the file. Looks from 100 rows seen on, or when `final`.
        """
        count = len(self) if count is None else count
        if seen and (final or seen >= MIN_SEEN) and count / seen > self.limit:
            raise RunError(
                f"{count} of {seen} rows are unusable ({count / seen:.1%}; the limit is {self.limit:.1%}): "
                f"{self.examples()}. {self.path} names them all. Mend the data or raise the limit."
            )

    def examples(self) -> str:
        return "; ".join(f"{where}: {reason}" for where, reason in islice(self.reasons.items(), 3))


@dataclass(frozen=True)
class Row:
    where: str  # file and row, as in bad_rows.jsonl
    prompt: str
    label: float  # preference for image 0: 1, 0, or 0.5 for a tie
    weight: float  # 1 / num_example_per_prompt: every prompt counts alike
    images: tuple[Callable[[], bytes], ...] = field(repr=False)

    def image(self, j: int) -> bytes:
        """The encoded image j (0 or 1). Raises BadRowError when it is missing."""
        return self.images[j]()


class PairSource(Protocol):
    """Rows known by their index 0..len-1; only those that passed the index pass count."""

    prompt_hash: np.ndarray  # (len,) uint64
    labelled: np.ndarray  # (len,) bool: a person gave the label
    tied: np.ndarray  # (len,) bool: neither image is preferred
    blocks: np.ndarray  # (len,) int32: rows with the same number are read together (a parquet row group)
    block_bytes: np.ndarray  # (blocks,) int64: what reading one holds in memory
    unlabelled: int  # rows left out because they have no label and say so
    seen: int  # rows there are, with all that were left out

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int] | np.ndarray) -> list[Row]:
        """The rows in the order asked for; each block they touch is read once."""
        ...


# ---- one row ---------------------------------------------------------------------------------------------------------


def checked(record: dict[str, Any]) -> tuple[str, float, float]:
    """Prompt (stripped), label of image 0 and weight of a row, or BadRowError.

    Labels may be any shares in [0, 1] that add up to 1. Without a count column the weight is 1; an empty count is bad.
    """
    prompt = record["prompt"]
    if not isinstance(prompt, str):
        raise BadRowError(f"the prompt is {'missing' if prompt is None else f'{prompt!r:.40}, not text'}")
    if not prompt.strip():
        raise BadRowError("the prompt is empty")
    if re.search("[\ud800-\udfff]", prompt):
        raise BadRowError("the prompt is not valid Unicode")
    count = number(record, COUNT_COLUMN) if COUNT_COLUMN in record else 1.0
    if not 1 <= count < float("inf"):
        raise BadRowError(f"{COUNT_COLUMN} is {count:g}, not a number of at least 1")
    try:
        first, second = (number(record, name) for name in LABEL_COLUMNS)
        if not (0 <= first <= 1 and 0 <= second <= 1 and abs(first + second - 1) < 1e-6):
            raise BadRowError(f"labels {first:g} and {second:g} are not two shares within 0..1 that add up to 1")
    except BadRowError as error:
        raise LabelError(str(error)) from None
    return prompt.strip(), first, 1 / count


def number(record: dict[str, Any], name: str) -> float:
    value = record.get(name)
    if value is None:
        raise BadRowError(f"{name} is missing")
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise BadRowError(f"{name} is {value!r:.40}, not a number") from None


def has_label(record: dict[str, Any]) -> bool:
    return str(record.get(HAS_LABEL_COLUMN, True)).strip().lower() in ("true", "1", "1.0")


def prompt_column(name: str, present: list[str], images: Sequence[str], caption: str | None) -> str:
    """The prompt's column. Raises ValueError when a needed column is missing or stands there twice."""
    wanted = PROMPT_COLUMNS if caption is None else (caption,)
    chosen = next((column for column in wanted if column in present), " or ".join(wanted))
    if missing := [column for column in (chosen, *images, *LABEL_COLUMNS) if column not in present]:
        raise ValueError(
            f"{name}: no column {', '.join(missing)}; found {', '.join(map(str, present)) or 'none'}. "
            "Rename the columns (another name of the prompts' one can be given as caption_column)."
        )
    if repeated := {column for column in present if present.count(column) > 1}:
        raise ValueError(f"{name}: column {', '.join(repeated)} stands there twice. Rename or delete one.")
    return chosen


# ---- sources ---------------------------------------------------------------------------------------------------------

# what the index pass meets: (where, number in the file from 1, block, place in the block or first byte, row or reason)
Found = tuple[str, int, int, int, "dict[str, Any] | BadRowError"]


class IndexedSource:
    """The index that both sources share, in arrays that grow without a Python object a row."""

    def _index(self, name: str, found: Iterable[Found], bad: BadRows) -> None:
        rows, places, hashes, blocks = array("q"), array("q"), array("Q"), array("i")
        labelled, tied = array("b"), array("b")
        rejected = self.unlabelled = 0
        for where, row, block, place, record in found:
            try:
                if isinstance(record, BadRowError):
                    raise record
                prompt, label, _ = checked(record)
            except BadRowError as error:
                if isinstance(error, LabelError) and isinstance(record, dict) and not has_label(record):
                    self.unlabelled += 1
                    continue
                bad.add(where, str(error))
                rejected += 1
                continue
            rows.append(row)
            places.append(place)
            # 64 bits: of 10^6 prompts, two share a hash with probability 3e-8
            hashes.append(int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=8).digest(), "little"))
            blocks.append(block)
            labelled.append(has_label(record))
            tied.append(label == 0.5)
        self.seen = len(rows) + rejected + self.unlabelled
        bad.check(self.seen, rejected, final=True)
        if not rows:
            why = f"{rejected} are bad ({bad.examples()}), {self.unlabelled} have no label"
            raise ValueError(
                f"{name}: {f'none of the {self.seen} rows is usable: {why}' if self.seen else 'no rows in it'}."
            )
        self.rows, self.places = np.frombuffer(rows, np.int64), np.frombuffer(places, np.int64)
        self.prompt_hash, self.blocks = np.frombuffer(hashes, np.uint64), np.frombuffer(blocks, np.int32)
        self.labelled, self.tied = np.frombuffer(labelled, np.bool_), np.frombuffer(tied, np.bool_)

    def __len__(self) -> int:
        return len(self.rows)


class ParquetSource(IndexedSource):
    """Parquet files in Pick-a-Pic's columns; a block is a row group.

    A row group is the least that can be read: files written with row groups of gigabytes need as much memory.
    files: name for messages -> function that opens it, in order. Other columns are not read; are_different neither, as
    in the published trainer's default.  root: what the names are relative to; None: on the hub. Images may be paths,
    relative to their file.
    """

    images = ("jpg_0", "jpg_1")

    def __init__(
        self, name: str, files: dict[str, Any], bad: BadRows, caption: str | None, root: Path | None = None
    ) -> None:
        self.names, self.openers, self.caption, self.root = list(files), list(files.values()), caption, root
        self.groups: list[tuple[int, int]] = []  # (file, row group) of each block
        sizes: list[int] = []
        self._index(name, self._found(sizes), bad)
        self.block_bytes = np.array(sizes, np.int64)

    @contextmanager
    def _open(self, number: int) -> Iterator[tuple[Any, list[str]]]:
        """The file, and its columns without the images, the prompt's first."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        name = self.names[number]
        try:
            # pre_buffer: few, large requests
            with self.openers[number]() as raw, pq.ParquetFile(raw, pre_buffer=True) as file:
                present = file.schema_arrow.names
                optional = [column for column in (COUNT_COLUMN, HAS_LABEL_COLUMN) if column in present]
                yield file, [prompt_column(name, present, self.images, self.caption), *LABEL_COLUMNS, *optional]
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(
                f"{name}: cannot be read as parquet ({reason_of(error)}). If it is torn, copy or download it again."
            ) from error

    def _found(self, sizes: list[int]) -> Iterator[Found]:
        for number, name in enumerate(self.names):
            with self._open(number) as (file, light):
                row = 0
                for group in range(file.num_row_groups):
                    meta = file.metadata.row_group(group)
                    chunks = [meta.column(i) for i in range(meta.num_columns)]
                    images = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in self.images]
                    sizes.append(sum(chunk.total_uncompressed_size for chunk in images))
                    self.groups.append((number, group))
                    first = row
                    for batch in file.iter_batches(INDEX_BATCH, row_groups=[group], columns=light):
                        for values in zip(*(as_bytes(batch[column]).to_pylist() for column in light), strict=True):
                            row += 1
                            record = light_record(light, values)
                            yield f"{name}, row {row}", row, len(sizes) - 1, row - 1 - first, record

    def read(self, indices: Sequence[int] | np.ndarray) -> list[Row]:
        indices = np.asarray(indices, np.int64)
        out: dict[int, Row] = {}  # by position in `indices`
        wanted: dict[int, dict[int, list[int]]] = {}  # file -> row group -> positions
        for position, block in enumerate(self.blocks[indices].tolist()):
            number, group = self.groups[block]
            wanted.setdefault(number, {}).setdefault(group, []).append(position)
        for number in sorted(wanted):
            folder = None if self.root is None else (self.root / self.names[number]).parent.resolve()
            with self._open(number) as (file, light):
                for group, positions in sorted(wanted[number].items()):
                    table = file.read_row_group(group, columns=[*light, *self.images])
                    columns = [as_bytes(table[column]) for column in light]
                    for position in positions:
                        place, row = int(self.places[indices[position]]), int(self.rows[indices[position]])
                        prompt, label, weight = checked(light_record(light, [c[place].as_py() for c in columns]))
                        images = tuple(partial(stored_image, j, table[j][place].as_py(), folder) for j in self.images)
                        out[position] = Row(f"{self.names[number]}, row {row}", prompt, label, weight, images)
        return [out[position] for position in range(len(indices))]


def as_bytes(column: Any) -> Any:
    """Text as bytes: Arrow would refuse a whole column for one row that is not UTF-8."""
    import pyarrow.types as types

    if types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    is_text = types.is_string(column.type) or types.is_large_string(column.type)
    return column.cast("large_binary") if is_text else column


def light_record(names: list[str], values: Iterable[Any]) -> dict[str, Any]:
    # surrogateescape: what is not UTF-8 survives until `checked` names it
    decoded = (v.decode("utf-8", "surrogateescape") if isinstance(v, bytes) else v for v in values)
    return dict(zip(("prompt", *names[1:]), decoded, strict=True))


def stored_image(name: str, value: Any, folder: Path | None) -> bytes:
    """value: bytes, a path relative to the folder, or a dict of both (the library `datasets`), bytes before path."""
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, str):
        if folder is None:
            raise BadRowError(
                f"{name} is a path, {value!r:.80}: of data on the hub the parquet files must hold the images"
            )
        if PurePath(value).is_relative_to(folder):  # absolute, as `datasets` remembers where a picture came from
            value = str(PurePath(value).relative_to(folder))
        check_inside(name, value)
        return image_inside(folder, name, value)
    if not isinstance(value, bytes):
        raise BadRowError(f"{name} is {'missing' if value is None else f'{value!r:.80}, not the bytes of an image'}")
    return value


class TableSource(IndexedSource):
    """A folder of images and a table (.jsonl, .csv, .tsv) that names them. Lines and images are read when asked for."""

    images = ("image_0", "image_1")

    def __init__(self, path: Path, bad: BadRows, caption: str | None) -> None:
        self.path, self.folder, self.caption = path, path.parent.resolve(), caption
        self.delimiter = DELIMITERS[path.suffix.lower()]
        self.header: list[str] = []
        try:
            with path.open("rb") as file:
                self._index(str(path), self._found(file), bad)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text ({error.reason}). Save the file as UTF-8.") from error
        self.blocks = np.arange(len(self), dtype=np.int32)
        self.block_bytes = np.zeros(len(self), np.int64)  # read by the workers, so never many at once

    def _entries(self, file: BinaryIO) -> Iterator[Any]:
        lines = (line.decode() for line in file)
        return csv.reader(lines, delimiter=self.delimiter, strict=True) if self.delimiter else lines

    def _found(self, file: BinaryIO) -> Iterator[Found]:
        file.seek(len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0)
        entries, line = self._entries(file), 0
        while True:
            start = file.tell()
            try:
                entry = next(entries, None)
            except csv.Error as error:
                where = f"{self.path}, from line {line + 1} on"
                raise ValueError(f"{where}: {error}. Mend the quoting; what follows cannot be told apart.") from error
            if entry is None:
                return
            line = getattr(entries, "line_num", line + 1)  # of a CSV row its last line
            if not entry or (isinstance(entry, str) and not entry.strip()):
                continue
            record: dict[str, Any] | BadRowError
            try:
                if not self.header:  # JSON: the first object stands for all
                    self.header = entry if self.delimiter else list(self._record(entry))
                    self.caption = prompt_column(f"{self.path}, line {line}", self.header, self.images, self.caption)
                    if self.delimiter:
                        continue
                record = self._record(entry)
                for name in self.images:
                    check_inside(name, record.get(name))
            except BadRowError as error:
                record = error
            yield f"{self.path.name}, line {line}", line, 0, start, record

    def _record(self, entry: Any) -> dict[str, Any]:
        if self.delimiter:
            if len(entry) != len(self.header):
                raise BadRowError(f"{len(entry)} fields where the header has {len(self.header)}")
            pairs = tuple(zip(self.header, entry, strict=True))
        else:
            try:
                pairs = json.loads(entry, object_pairs_hook=tuple)  # a tuple is an object, a list is an array
            except (ValueError, RecursionError) as error:
                raise BadRowError(f"not JSON ({error})") from None
            if not isinstance(pairs, tuple):
                raise BadRowError(f"a JSON {type(pairs).__name__}, not an object")
            if len(dict(pairs)) < len(pairs):
                raise BadRowError("a name stands twice in the JSON object")
        record = dict(pairs)
        return {**record, "prompt": record.get(self.caption)} if self.caption in self.header else record

    def read(self, indices: Sequence[int] | np.ndarray) -> list[Row]:
        out = []
        with self.path.open("rb") as file:
            for index in np.asarray(indices, np.int64).tolist():
                file.seek(int(self.places[index]))
                record = self._record(next(self._entries(file)))
                images = tuple(partial(image_inside, self.folder, name, record[name]) for name in self.images)
                out.append(Row(f"{self.path.name}, line {self.rows[index]}", *checked(record), images))
        return out


def check_inside(name: str, value: Any) -> None:
    """What can be told without touching the disk; symbolic links are followed when the image is read."""
    if value is None or value == "":
        raise BadRowError(f"{name} is missing")
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise BadRowError(f"{name} is {value!r:.80}, not a path")
    path = PureWindowsPath(value)  # knows both kinds of slashes, and drives
    if path.anchor or ".." in path.parts:
        raise BadRowError(f"{name} {value!r:.80} leaves the table's folder")


def image_inside(folder: Path, name: str, value: str) -> bytes:
    try:
        path = (folder / value).resolve()
        if not path.is_relative_to(folder):
            raise BadRowError(f"{name} {value!r:.80} leaves the table's folder through a link")
        if not path.is_file():  # a pipe would be waited on for ever
            raise BadRowError(f"{name} {value!r:.80} is not a file")
        return path.read_bytes()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise BadRowError(f"{name} {value!r:.80} cannot be read ({reason_of(error)})") from None


def open_pairs(
    spec: str | Path,
    bad: BadRows,
    *,
    caption_column: str | None = None,
    revision: str | None = None,
    filesystem: Any = None,
    split: str = "train",
) -> PairSource:
    """Index the pairs that `spec` names. Unusable rows are added to `bad`; whole-file faults raise.

    spec: a .parquet file or a folder of them (searched with its subfolders); a .jsonl, .csv or .tsv table, or the
    folder that holds it beside the images, itself or in its subfolders; else the id owner/name of a data set on the
    Hugging Face hub, whose parquet files are streamed.
    split: what is read where files are sorted into splits by their names (splits.py): train or validation.
    caption_column: None takes caption or prompt.  revision: of the hub's data set.
    filesystem: an fsspec file system with the hub's paths (datasets/owner/name), instead of the hub.
    Raises FileNotFoundError, ImportError (parquet without pyarrow), ConnectionError or ValueError, naming the file.
    """
    path = Path(spec)
    kinds = f"a .parquet file or a folder of them, or a table ({', '.join(DELIMITERS)}) or its folder"
    if not path.exists():
        is_file = path.suffix.lower() in (".parquet", *DELIMITERS)
        if is_file or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", str(spec)):
            raise FileNotFoundError(
                f"{spec}: no such file or folder. Give {kinds}, or a data set's id on the hub (owner/name)."
            )
        return hub_parquet(str(spec), bad, caption_column, revision, filesystem, split)
    if revision is not None:
        raise ValueError(f"{path}: revision={revision!r} is for data sets on the hub, and this path is here.")
    root = path if path.is_dir() else path.parent
    files = [p for p in (path.rglob("*.parquet") if path.is_dir() else [path]) if p.suffix.lower() == ".parquet"]
    tables = [p for p in (path.iterdir() if path.is_dir() else [path]) if p.suffix.lower() in DELIMITERS]
    if not files and not tables:
        tables = [p for suffix in DELIMITERS for p in path.rglob(f"*{suffix}")]
    clash = bool(files) == bool(tables)
    found = {p.relative_to(root).as_posix(): p for p in ([*tables, *files] if clash else files or tables)}
    if path.is_dir() and not clash:
        found = {name: found[name] for name in files_of(str(path), found, split)}
    if clash or (tables and len(found) > 1):
        names = ", ".join(sorted(p.name for p in found.values())[:5]) or "neither"
        raise ValueError(f"{path}: found {names}. Give {kinds}, with nothing else of the kind in it.")
    if tables:
        return TableSource(next(iter(found.values())), bad, caption_column)
    openers = {name: partial(p.open, "rb") for name, p in found.items()}
    return parquet_source(str(path), openers, bad, caption_column, root)


def hub_parquet(
    spec: str, bad: BadRows, caption: str | None, revision: str | None, filesystem: Any, split: str
) -> PairSource:
    need_pyarrow(spec)
    if filesystem is None:
        from huggingface_hub import HfFileSystem

        filesystem = HfFileSystem()
    root = f"datasets/{spec}"
    # ~parquet: the hub's own conversion. Only of the main revision, so it cannot stand for another one.
    roots = [f"{root}@{quote(revision, safe='')}"] if revision else [root, f"{root}@~parquet"]
    for root in roots:
        try:
            paths = [path for path in filesystem.find(root) if path.endswith(".parquet")]
        except FileNotFoundError:
            continue
        except Exception as error:  # the HTTP library's, which are no OSErrors
            raise ConnectionError(
                f"{spec}: no such local path, and the hub cannot be asked ({type(error).__name__}: {error}). "
                "Check the connection and HF_HUB_OFFLINE, or download the data set and give its folder."
            ) from error
        if paths:
            if root != roots[0]:
                logger.warning(f"{spec} holds no parquet files: reading the hub's conversion, {root}")
            # no read-ahead: Parquet knows which bytes it needs
            opened = {p.split(f"{root}/")[-1]: partial(filesystem.open, p, "rb", cache_type="none") for p in paths}
            return parquet_source(spec, {name: opened[name] for name in files_of(spec, opened, split)}, bad, caption)
    raise FileNotFoundError(
        f"{spec}: no such local path, and no parquet files on the hub under {' or '.join(roots)}. Check the id and the "
        "revision, log in if it is private, or download the data set and give its folder."
    )


def need_pyarrow(name: str) -> None:
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{name}: reading parquet needs pyarrow: pip install 'spo_fast[data]'") from error


def parquet_source(
    name: str, files: dict[str, Any], bad: BadRows, caption: str | None, root: Path | None = None
) -> PairSource:
    need_pyarrow(name)
    return ParquetSource(name, files, bad, caption, root)


# ---- order -----------------------------------------------------------------------------------------------------------


def split_by_prompt(source: PairSource, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of training and validation rows; share: the expected share of prompts that validate, in [0, 1).

    A prompt's side is a function of (seed, prompt) alone, whatever else the data holds. Unlabelled rows of a validation
    prompt are on neither side.
    """
    if not 0 <= share < 1:
        raise ValueError(f"share={share} of the prompts cannot validate. Use a number from 0 to below 1.")
    key = mixed(np.array([seed % 2**64], np.uint64))
    validates = (mixed(source.prompt_hash ^ key) >> np.uint64(11)) * 2.0**-53 < share
    train, validation = np.flatnonzero(~validates), np.flatnonzero(validates & source.labelled)
    if not len(train) or (share > 0 and not len(validation)):
        raise ValueError(
            f"{len(train)} training and {len(validation)} validation rows of {len(source)}: share={share} leaves one "
            "side empty. Change the share or the seed, or add prompts (share 0 goes without validation)."
        )
    return train, validation


def mixed(x: np.ndarray) -> np.ndarray:
    """The bits of uint64, stirred: splitmix64's output function (Steele, Lea, Flood 2014) of x + its increment."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def windows_of(
    source: PairSource, indices: np.ndarray, window_rows: int, key: tuple[int, int] | None
) -> tuple[np.ndarray, list[int]]:
    """An epoch's order of the rows, and where in it each window ends. key: (seed, epoch); None keeps the given order.

    A window takes whole blocks while they fit into window_rows and WINDOW_BYTES, and at least one.
    """
    indices = np.asarray(indices, np.int64)
    if key is not None:
        indices = indices[np.lexsort((indices, source.blocks[indices]))]
    blocks = source.blocks[indices]
    starts = np.flatnonzero(np.diff(blocks, prepend=-1))
    lengths, numbers = np.diff(starts, append=len(indices)), blocks[starts]
    if key is not None:
        order = noise.permutation(len(starts), *key, noise.PAIRS).numpy()
        indices = indices[np.argsort(np.repeat(np.argsort(order), lengths), kind="stable")]
        lengths, numbers = lengths[order], numbers[order]
    ends: list[int] = []
    rows = size = end = 0
    for length, nbytes in zip(lengths.tolist(), source.block_bytes[numbers].tolist(), strict=True):
        if rows and (rows + length > window_rows or size + nbytes > WINDOW_BYTES):
            ends.append(end)
            rows = size = 0
        rows, size, end = rows + length, size + nbytes, end + length
    ends.append(end)
    if key is not None:
        window = np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0))
        indices = indices[np.lexsort((noise.permutation(len(indices), *key, noise.PAIRS + 1).numpy(), window))]
    return indices, ends


def shuffled(
    source: PairSource, indices: np.ndarray, seed: int, epoch: int, window_rows: int = WINDOW_ROWS
) -> np.ndarray:
    """The epoch's order: row groups permuted, then rows within windows of whole row groups."""
    return windows_of(source, indices, window_rows, (seed, epoch))[0]


# ---- batches ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairBatch(Generic[T]):
    prompts: list[str]
    labels: Tensor  # (B,) float32, of image 0
    weights: Tensor  # (B,) float32
    loaded: list[T]
    position: int  # rows consumed since the start, over all epochs, bad ones included


class PairStream(Iterator[PairBatch[T]]):
    """Batches of pairs, for ever or for `epochs`; a new stream given a batch's `position` yields what follows it.

    load: runs in `workers` threads, at most `prefetch` batches ahead. Rows for which it raises BadRowError are added to
    `bad` and skipped; its other exceptions reach the consumer, and end the stream. Batches are full whatever was
    skipped, across epochs too; only the last of finite epochs may be short.
    Raises ValueError when too many rows are bad, or an epoch has no usable one.
    """

    def __init__(
        self,
        source: PairSource,
        indices: np.ndarray,
        batch_size: int,
        load: Callable[[Row], T],
        bad: BadRows,
        *,
        seed: int,
        position: int = 0,
        epochs: int | None = None,
        shuffle: bool = True,
        workers: int = 4,
        prefetch: int = 4,
    ) -> None:
        if min(len(indices), batch_size, workers, prefetch) < 1 or position < 0:
            raise ValueError(
                f"{len(indices)} rows, batch_size={batch_size}, workers={workers} and prefetch={prefetch} must be at "
                f"least 1, position={position} at least 0."
            )
        self.source, self.indices, self.batch_size = source, np.asarray(indices, np.int64), batch_size
        self.load, self.bad, self.seed, self.shuffle = load, bad, seed, shuffle
        self.position, self.epochs, self.ahead = position, epochs, prefetch * batch_size
        self._pool, self._reader = ThreadPoolExecutor(workers), ThreadPoolExecutor(1)
        self._batches, self._closed = self._make_batches(), False

    def __next__(self) -> PairBatch[T]:
        if self._closed:
            raise StopIteration
        return next(self._batches)

    def __enter__(self) -> PairStream[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads; what they had under way is lost."""
        self._closed = True
        for pool in (self._pool, self._reader):
            pool.shutdown(cancel_futures=True)

    def _make_batches(self) -> Iterator[PairBatch[T]]:
        pending: deque[tuple[int, Row, Any]] = deque()
        batch: list[tuple[Row, T]] = []
        rows = self._rows()
        seen = rejected = usable = end = 0
        whole_epoch = self.position % len(self.indices) == 0  # one entered midway may well end in bad rows
        try:
            while True:
                for position, row in islice(rows, self.ahead - len(pending)):
                    pending.append((position, row, self._pool.submit(self.load, row)))
                if not pending:
                    break
                end, row, future = pending.popleft()
                seen += 1
                try:
                    batch.append((row, future.result()))
                    usable += 1
                except BadRowError as error:
                    self.bad.add(row.where, str(error))
                    rejected += 1
                # of this stream's own rows: known ones are met again, so a restart does not get past the limit
                self.bad.check(seen, rejected)
                if end % len(self.indices) == 0:
                    if whole_epoch and not usable:
                        raise RunError(
                            f"none of an epoch's {len(self.indices)} rows is usable ({self.bad.examples()}). "
                            f"{self.bad.path} names them all. Mend the data."
                        )
                    usable, whole_epoch = 0, True
                if len(batch) == self.batch_size:
                    yield make_batch(batch, end)
                    batch = []
            if batch:
                yield make_batch(batch, end)
        finally:
            self.close()

    def _rows(self) -> Iterator[tuple[int, Row]]:
        """(position after it, row), while the next window is being read."""
        windows = self._windows()
        coming = self._reader.submit(next, windows, None)
        while (window := coming.result()) is not None:
            coming = self._reader.submit(next, windows, None)
            position, rows = window
            rows.reverse()
            while rows:  # popped, so that images leave memory as they are used
                position += 1
                yield position, rows.pop()

    def _windows(self) -> Iterator[tuple[int, list[Row]]]:
        """(position before it, the rows of a window)."""
        epoch, offset = divmod(self.position, len(self.indices))
        while self.epochs is None or epoch < self.epochs:
            order, ends = windows_of(
                self.source, self.indices, WINDOW_ROWS, (self.seed, epoch) if self.shuffle else None
            )
            for end in ends:
                if end > offset:
                    yield epoch * len(order) + offset, self.source.read(order[offset:end])
                    offset = end
            epoch, offset = epoch + 1, 0


def make_batch(rows: list[tuple[Row, T]], position: int) -> PairBatch[T]:
    labels = torch.tensor([row.label for row, _ in rows], dtype=torch.float32)
    weights = torch.tensor([row.weight for row, _ in rows], dtype=torch.float32)
    return PairBatch([row.prompt for row, _ in rows], labels, weights, [loaded for _, loaded in rows], position)


# ---- images ----------------------------------------------------------------------------------------------------------


def decode_image(data: bytes) -> Image.Image:
    """The first frame in 8-bit RGB, turned as its EXIF data say; transparency shows white. Raises BadRowError.

    The published code drops alpha instead, which shows whatever colour lies under it, and does not turn; Pick-a-Pic's
    files have neither. 16 bits are cut to their upper 8; of wider numbers the range is not known.
    """
    if not data:
        raise BadRowError("the image is empty (0 bytes)")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as stored:
            width, height = stored.size
            if not 0 < width * height <= MAX_PIXELS:
                raise BadRowError(f"the image has {width} x {height} pixels, of at most {MAX_PIXELS}")
            if stored.mode == "F":
                raise BadRowError("the image holds floating-point numbers, whose range is not known")
            if stored.mode == "I" and stored.format == "TIFF":  # I;16 otherwise; of PNG and PPM files I are 16 bits too
                raise BadRowError("the image holds 32-bit or signed numbers, whose range is not known")
            image = upright(stored)
            clear = image.info.get("transparency")  # of PNG without alpha: the value that is not to be seen
            if image.mode.startswith("I"):  # Pillow's own conversion clips at 255
                values = np.asarray(image)
                grey = np.where(values == clear, 255, (values >> 8).clip(0, 255))  # == None: nowhere
                return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
            if stored.format == "PNG" and clear is not None and image.mode in ("L", "RGB"):  # Pillow scales pixels only
                image.info["transparency"] = in_8_bits(clear, depth=data[24])
            if "A" in image.mode.upper() and image.mode != "LAB" or "transparency" in image.info:
                white = Image.new("RGBA", image.size, "white")
                return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
            return image.convert("RGB")
    except BadRowError:
        raise
    except UnidentifiedImageError:  # its own message holds a memory address
        raise BadRowError(f"not an image of a known format ({', '.join(FORMATS)})") from None
    except Exception as error:  # Pillow's decoders raise whatever the damage leads to
        raise BadRowError(f"the image cannot be decoded ({type(error).__name__}: {error})") from None


def upright(image: Image.Image) -> Image.Image:
    """Turned and mirrored as its EXIF data say; damaged ones are ignored, as viewers do."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # whatever the damage leads to
        return image
    return ImageOps.exif_transpose(image) if orientation in range(2, 9) else image


def in_8_bits(value: int | tuple[int, ...], depth: int) -> int | tuple[int, ...]:
    """A PNG file's own sample value, or three, as the 8 bits that Pillow makes of its pixels; depth: bits a sample."""
    if isinstance(value, tuple):
        return tuple(v >> (depth - 8) for v in value)
    return value * 255 // (2**depth - 1)


def to_square(image: Image.Image, size: int) -> Tensor:  # (3, size, size) float32 in [-1, 1]
    """Shortest side to `size` (bicubic, antialiased), centre crop: CLIPImageProcessor without its normalisation."""
    width, height = image.size
    short = min(width, height)
    if max(width, height) > MAX_ASPECT * short:
        raise BadRowError(f"the image is {width} x {height}: more than {MAX_ASPECT} times as long as wide")
    width, height = int(size * width / short), int(size * height / short)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    pixels = np.array(image.crop((left, top, left + size, top + size)))
    return torch.from_numpy(pixels).permute(2, 0, 1).float().contiguous() / 255 * 2 - 1
