"""Reading prompts from any common file."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from spo_fast.data.files import reason_of

BUILTIN_PROMPTS = Path(__file__).parent / "prompt_lists" / "builtin.txt"
TOY_PROMPTS = BUILTIN_PROMPTS.with_name("toy.txt")  # the training prompts of toy_world.py
PROMPT_COLUMNS = ("caption", "prompt", "text")  # the first one present is read; the published prompt file has "caption"

Located = tuple[str, object]  # (where in the file, for an error message; the value found there)


def load_prompts(path: str | Path | None, column: str | None = None, quoted: bool = True) -> list[str]:
    """Read prompts from .txt, .json, .jsonl, .csv, .tsv or .parquet; None reads the built-in ones.

    path: text files hold one prompt a line (blank lines and lines starting with # are skipped); JSON is a list of
    strings or of objects (the published format: [{"caption": ..., "trainset_idx": ...}]); tables have a header.
    column: the field to read; None takes the first of caption, prompt, text.
    quoted: cells of a table may stand in double quotes; False: a quote is a character like any other.
    Returns the prompts in file order, stripped; repeats are kept (see count_repeats).
    Raises FileNotFoundError, ImportError (parquet without pyarrow) or ValueError naming the file and line to mend.
    """
    path = BUILTIN_PROMPTS if path is None else Path(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(
            f"{path}: cannot read prompts from a {path.suffix or 'nameless'} file. Use {', '.join(READERS)}."
        )
    if not path.is_file():
        what = "is a folder, not a file of prompts" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{path} {what}. Give a file of prompts, or leave the flag out.")
    try:
        found = reader(path, column) if quoted or reader is not read_table else read_table(path, column, quoted)
        prompts = [checked_prompt(path, where, value) for where, value in found]
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: byte {error.start} is not UTF-8 ({error.reason}). Save the file as UTF-8."
        ) from error
    if not prompts:
        raise ValueError(f"{path}: no prompts in it. Put in at least one, or leave the flag out.")
    return prompts


def column_in(path: str | Path, column: str | None) -> str | None:
    """A column that is meant for several files, of one of them: a text file has none."""
    return None if Path(path).suffix.lower() == ".txt" else column


def checked_prompt(path: Path, where: str, value: object) -> str:
    """The stripped prompt, or a ValueError naming the place."""
    if not isinstance(value, str):
        raise ValueError(f"{path}, {where}: a prompt must be a string, found {value!r:.80}. Mend or delete this entry.")
    if not value.strip():
        raise ValueError(f"{path}, {where}: the prompt is empty. Mend or delete this entry.")
    if re.search("[\ud800-\udfff]", value):
        raise ValueError(f"{path}, {where}: {value!r:.80} is not valid Unicode. Mend or delete this entry.")
    return value.strip()


def count_repeats(prompts: list[str]) -> int:
    """How many prompts repeat an earlier one exactly (they are drawn more often than the others)."""
    return len(prompts) - len(set(prompts))


def read_text(path: Path, column: str | None) -> Iterator[Located]:
    """A prompt a line; # begins a comment. Raises ValueError if a column was asked for."""
    if column is not None:
        raise ValueError(
            f"{path}: a text file has no columns, but column {column!r} was asked for. Leave --caption_column out."
        )
    comments = []
    for number, line in enumerate(read_lines(path), 1):
        if line.startswith("#"):
            comments.append(number)
        elif line.strip():
            yield f"line {number}", line
    if comments and path.parent != BUILTIN_PROMPTS.parent:
        print(
            f"{path}: lines that begin with # are comments, {len(comments)} of them skipped (the first is line "
            f"{comments[0]}). If one is a prompt, put a space before its #."
        )


def read_json(path: Path, column: str | None) -> Iterator[Located]:
    """A list of strings, or of objects with the column."""
    entries = parse_json(path, path.read_text(encoding="utf-8-sig"), first_line=1)
    if not isinstance(entries, list):
        raise ValueError(
            f"{path}: the file holds {type(entries).__name__}, not a list. "
            'Write a list of strings or of objects such as [{"caption": "..."}].'
        )
    yield from pick_field(path, ((f"entry {number}", entry) for number, entry in enumerate(entries, 1)), column)


def read_jsonl(path: Path, column: str | None) -> Iterator[Located]:
    """A string or an object a line."""
    lines = ((number, line) for number, line in enumerate(read_lines(path), 1) if line.strip())
    entries = ((f"line {number}", parse_json(path, line, first_line=number)) for number, line in lines)
    yield from pick_field(path, entries, column)


def read_table(path: Path, column: str | None, quoted: bool = True) -> Iterator[Located]:
    """CSV, or TSV by the file's suffix; the first line is the header."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        # strict: a stray quote is an error here, not a prompt that swallows the rest of the file
        rows = csv.DictReader(
            file, delimiter=delimiter, strict=True, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
        )
        try:
            column = chosen_column(path, "line 1", rows.fieldnames or [], column)
            for row in rows:
                if None in row:  # more cells than the header has: an unquoted comma cut the prompt
                    raise ValueError(
                        f"{path}, line {rows.line_num}: more cells than the header's {len(rows.fieldnames or [])}. "
                        f"Put prompts that contain {delimiter!r} into double quotes."
                    )
                yield f"line {rows.line_num}", row[column]
        except csv.Error as error:
            raise ValueError(f"{path}, line {rows.reader.line_num}: {error}. Mend the quoting of this line.") from error


def read_parquet(path: Path, column: str | None) -> Iterator[Located]:
    """The column of a parquet file. Raises ImportError without pyarrow."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError(
            f"{path}: reading parquet needs pyarrow. Install it with `pip install spo_fast[data]`."
        ) from error
    try:
        with pq.ParquetFile(path) as file:
            column = chosen_column(path, "schema", file.schema_arrow.names, column)
            # this column only: Pick-a-Pic's files hold the images too, gigabytes of them
            values = file.read(columns=[column]).column(0).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path}: not a whole parquet file ({reason_of(error)}). Copy or download it again."
        ) from error
    yield from ((f"row {number}", value) for number, value in enumerate(values, 1))


READERS = {
    ".txt": read_text,
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".csv": read_table,
    ".tsv": read_table,
    ".parquet": read_parquet,
}


def read_lines(path: Path) -> list[str]:
    """Lines as editors count them."""
    # utf-8-sig: Windows editors put a byte-order mark first. split, not splitlines: U+2028 may stand inside a prompt.
    return path.read_text(encoding="utf-8-sig").split("\n")


def parse_json(path: Path, text: str, first_line: int) -> Any:
    """Raises ValueError that names the line, counted from first_line."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(
            f"{path}, line {line}, column {error.colno}: not JSON: {error.msg}. Mend this line."
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets a thousand deep
        raise ValueError(f"{path}, from line {first_line} on: not JSON that can be read: {error}.") from error


def pick_field(path: Path, entries: Iterable[Located], column: str | None) -> Iterator[Located]:
    """Strings as they are, objects by their prompt field."""
    for where, entry in entries:
        yield where, entry[chosen_column(path, where, list(entry), column)] if isinstance(entry, dict) else entry


def chosen_column(path: Path, where: str, present: Iterable[str], column: str | None) -> str:
    """The column to read, or a ValueError that lists the ones there are."""
    present = list(present)
    wanted = PROMPT_COLUMNS if column is None else (column,)
    for name in wanted:
        if name in present:
            return name
    found = ", ".join(map(in_line, present[:8])) or "none"
    raise ValueError(
        f"{path}, {where}: no column {' or '.join(map(in_line, wanted))}; found {found}. "
        "Name the prompts' column by --caption_column, or rename it."
    )


def in_line(name: object) -> str:
    """A name out of a file, which may hold anything, as part of a message of one line."""
    return " ".join(str(name)[:40].split())
