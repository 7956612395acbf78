"""Tables as text: aligned, whole at any width, nothing read as markup."""

from __future__ import annotations

from spo_fast.config.tables import columns, markdown, size_text

ROWS = [["", "mean", "file"], ["[rank 1] a", "0.1234 [0.1201, 0.1267]", "x" * 120], ["b", "-1", ""]]


def test_columns_by_hand() -> None:
    assert columns(ROWS).split("\n") == [
        "            mean                     file",
        f"[rank 1] a  0.1234 [0.1201, 0.1267]  {'x' * 120}",
        "b           -1",
    ]


def test_markdown_by_hand() -> None:
    assert markdown([["", "a"], ["long", "1"]]).split("\n") == ["|      | a |", "|------|---|", "| long | 1 |"]


def test_sizes_by_hand() -> None:
    assert [size_text(n) for n in (0, 1023, 1024, 1.5 * 2**20, -(2**31), 2**42)] == [
        *("0 B", "1023 B", "1.0 KiB", "1.5 MiB", "-2.0 GiB", "4096.0 GiB")
    ]
