"""Errors that a user can mend, and the hints they carry."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass

from spo_fast.config.tables import columns


class RunError(ValueError):
    """A run cannot go on, for a reason its user can mend."""


# ------------------------------------------------------------------------------------------------ what a field may hold


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """A sentence that names the nearest known name, or nothing if none is near."""
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


class UsageError(ValueError):
    """The command line itself is wrong: exit status 2, as argparse has it."""


# ---------------------------------------------------------------------------------------------- what is missing


@dataclass(frozen=True)
class Needed:
    """One thing a run needs."""

    what: str
    source: str  # the hub id or path that was asked for
    file: str  # its file, or "" when several are meant
    flag: str  # the flag that takes a local path instead


@dataclass(frozen=True)
class Missing(Needed):
    """One thing a run needs and cannot find."""

    why: str


class MissingFilesError(FileNotFoundError):
    """Everything a run needs and cannot find, in one message; `missing` has the rows."""

    def __init__(self, missing: list[Missing]) -> None:
        self.missing = missing
        super().__init__(missing_table(missing))


def missing_table(missing: list[Missing]) -> str:
    """The message of MissingFilesError: one line for each thing, with the flag that takes a local path."""
    rows = [("what", "from", "file", "flag for a local path", "why")]
    rows += [(m.what, m.source, m.file or "-", m.flag, m.why) for m in missing]
    head = f"this run needs what is missing here ({len(missing)}):"
    return "\n".join(
        [
            head,
            textwrap.indent(columns(rows), "  "),
            "Connect to the hub, or copy the files here and give their paths by the flags.",
        ]
    )
