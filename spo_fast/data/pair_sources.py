"""Where labelled pairs of images lie: parquet files, a folder with a table, a hub data set.

What stays in memory is an index of 30 bytes a row: where the row lies and a hash of its prompt.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import logging
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePath, PureWindowsPath
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import quote

import numpy as np

from spo_fast.data.files import reason_of
from spo_fast.data.pair_rows import (
    COUNT_COLUMN,
    HAS_LABEL_COLUMN,
    LABEL_COLUMNS,
    BadRowError,
    BadRows,
    LabelError,
    PairRow,
    PairSource,
    checked,
    has_label,
    prompt_column,
)
from spo_fast.data.splits import files_of

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from fsspec import AbstractFileSystem

logger = logging.getLogger(__name__)

DELIMITERS = {".jsonl": None, ".csv": ",", ".tsv": "\t"}  # the tables a folder of images may have
INDEX_BATCH = 4096  # rows held as Python objects while indexing

# what the index pass meets: (where, number in the file from 1, block, place in the block or first byte, row or reason)
Found = tuple[str, int, int, int, "Mapping[str, object] | BadRowError"]


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
                if isinstance(error, LabelError) and isinstance(record, Mapping) and not has_label(record):
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
        self,
        name: str,
        files: Mapping[str, Callable[[], BinaryIO]],
        bad: BadRows,
        caption: str | None,
        root: Path | None = None,
    ) -> None:
        self.names, self.openers, self.caption, self.root = list(files), list(files.values()), caption, root
        self.groups: list[tuple[int, int]] = []  # (file, row group) of each block
        sizes: list[int] = []
        self._index(name, self._found(sizes), bad)
        self.block_bytes = np.array(sizes, np.int64)

    @contextmanager
    def _open(self, number: int) -> Iterator[tuple[pq.ParquetFile, list[str]]]:
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

    def read(self, indices: Sequence[int] | np.ndarray) -> list[PairRow]:
        """The rows at these indices, in this order; a row group is read once."""
        indices = np.asarray(indices, np.int64)
        out: dict[int, PairRow] = {}  # by position in `indices`
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
                        out[position] = PairRow(f"{self.names[number]}, row {row}", prompt, label, weight, images)
        return [out[position] for position in range(len(indices))]


def as_bytes(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Text as bytes: Arrow would refuse a whole column for one row that is not UTF-8."""
    from pyarrow import types

    if types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    is_text = types.is_string(column.type) or types.is_large_string(column.type)
    return column.cast("large_binary") if is_text else column


def light_record(names: list[str], values: Iterable[object]) -> dict[str, object]:
    """A row without its images, as `checked` wants it."""
    # surrogateescape: what is not UTF-8 survives until `checked` names it
    decoded = (v.decode("utf-8", "surrogateescape") if isinstance(v, bytes) else v for v in values)
    return dict(zip(("prompt", *names[1:]), decoded, strict=True))


def stored_image(name: str, value: object, folder: Path | None) -> bytes:
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

    def _entries(self, file: BinaryIO) -> Iterator[str | list[str]]:
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
            record: Mapping[str, object] | BadRowError
            try:
                if not self.header:  # JSON: the first object stands for all
                    self.header = entry if isinstance(entry, list) else list(self._record(entry))
                    self.caption = prompt_column(f"{self.path}, line {line}", self.header, self.images, self.caption)
                    if self.delimiter:
                        continue
                record = self._record(entry)
                for name in self.images:
                    check_inside(name, record.get(name))
            except BadRowError as error:
                record = error
            yield f"{self.path.name}, line {line}", line, 0, start, record

    def _record(self, entry: str | list[str]) -> dict[str, Any]:
        if isinstance(entry, list):
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

    def read(self, indices: Sequence[int] | np.ndarray) -> list[PairRow]:
        """The rows at these indices, in this order."""
        out = []
        with self.path.open("rb") as file:
            for index in np.asarray(indices, np.int64).tolist():
                file.seek(int(self.places[index]))
                record = self._record(next(self._entries(file)))
                images = tuple(partial(image_inside, self.folder, name, record[name]) for name in self.images)
                out.append(PairRow(f"{self.path.name}, line {self.rows[index]}", *checked(record), images))
        return out


def check_inside(name: str, value: object) -> None:
    """What can be told without touching the disk; symbolic links are followed when the image is read."""
    if value is None or value == "":
        raise BadRowError(f"{name} is missing")
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise BadRowError(f"{name} is {value!r:.80}, not a path")
    path = PureWindowsPath(value)  # knows both kinds of slashes, and drives
    if path.anchor or ".." in path.parts:
        raise BadRowError(f"{name} {value!r:.80} leaves the table's folder")


def image_inside(folder: Path, name: str, value: str) -> bytes:
    """An image's bytes. Raises BadRowError for a path that leaves the folder, or is no file."""
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
    filesystem: AbstractFileSystem | None = None,
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
    openers: dict[str, Callable[[], BinaryIO]]
    openers = {name: partial(p.open, "rb") for name, p in found.items()}  # type: ignore[misc]
    return parquet_source(str(path), openers, bad, caption_column, root)


def hub_parquet(
    spec: str,
    bad: BadRows,
    caption: str | None,
    revision: str | None,
    filesystem: AbstractFileSystem | None,
    split: str,
) -> PairSource:
    """The parquet files of a data set on the hub, read row group by row group."""
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
    """Raises ImportError, with the remedy, where pyarrow is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{name}: parquet needs pyarrow: pip install 'spo_fast[data]'") from error


def parquet_source(
    name: str, files: Mapping[str, Callable[[], BinaryIO]], bad: BadRows, caption: str | None, root: Path | None = None
) -> PairSource:
    """Parquet files by their names, each with what opens it."""
    need_pyarrow(name)
    return ParquetSource(name, files, bad, caption, root)
