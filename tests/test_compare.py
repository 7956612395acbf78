"""compare.py: the page in a real browser, votes out and in again, and what it says of bad files."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser
from markupsafe import escape
from PIL import Image
from runs import command_line, run_toy

from spo_fast import compare
from spo_fast.evaluation.pages.votes import QUESTIONS, Vote, read_votes, user_study

NASTY = 'a </script><script>alert(1)</script> & "ring" <img src=x>'
SETTINGS: dict[str, Any] = {
    "model": "toy",
    "num_steps": 3,
    "images_at_once": 4,
    "num_shown": 3,
    "metrics": "pickscore",
    "images_per_prompt": 1,
}


def words(out: Path, **settings: Any) -> list[str]:
    return command_line({**SETTINGS, "prompts": out / "prompts.txt", "output_dir": out, **settings})


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(report's directory, run)."""
    out = tmp_path_factory.mktemp("compare")
    run = run_toy(out / "mine", resolution=16, learning_rate=5e-3)
    (out / "prompts.txt").write_text(f"{NASTY}\na red ring\na blue cross\n")
    assert compare.main(words(out, a="base", b=run)) == 0
    return out, run


def embedded(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found
    return json.loads(found[1])


def test_the_page_is_whole_escaped_and_alone(report: tuple[Path, Path]) -> None:
    page = (report[0] / "report.html").read_text()
    assert NASTY not in page and page.count(str(escape(NASTY))) == 1
    assert page.count("<script") == 3 and "http://" not in page and "https://" not in page
    data = embedded(page)
    assert sorted(t["number"] for t in data["trials"]) == [0, 1, 2]
    assert {t["prompt"] for t in data["trials"]} == {NASTY, "a red ring", "a blue cross"}
    assert page.count("data:image/") == 6
    with Image.open(report[0] / "grid.png") as grid:
        assert grid.width * 3 == grid.height * 2  # three prompts, two sides


def test_order_and_sides_are_the_seeds(report: tuple[Path, Path]) -> None:
    out, run = report
    before = (out / "report.html").read_bytes()
    assert compare.main(words(out, b=run)) == 0  # --a base is the default; twice the same page
    assert (out / "report.html").read_bytes() == before


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def test_voting_in_a_browser(browser: Browser, report: tuple[Path, Path], tmp_path: Path) -> None:
    out, run = report
    browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    browser.open(out / "report.html")
    data = embedded((out / "report.html").read_text())
    assert browser.run("[...document.images].slice(0, 6).every(i => i.complete && i.naturalWidth === 16)")
    assert browser.run("document.querySelectorAll('.row img').length") == 6

    browser.run("document.getElementById('start').click()")
    assert browser.run("getComputedStyle(document.getElementById('results')).display") == "none"
    names = browser.run("document.getElementById('asking').innerText + document.getElementById('asking').innerHTML")
    assert "base" not in re.sub(r"base64,\S+", "", names) and "mine" not in names
    keys = ["ArrowLeft", "ArrowRight", "ArrowDown", "1", "2", "2", "ArrowLeft", "Backspace", "ArrowRight", "1"]
    for key in keys:
        browser.press(key)
    assert browser.run("document.getElementById('progress').textContent") == "8 of 9"
    trial = data["trials"][2]
    assert browser.run("document.getElementById('prompt').textContent") == trial["prompt"]
    assert browser.run(f"document.getElementById('left').src === document.getElementById('picture-{trial['row']}-"
                       f"{trial['sides'][0]}').src")  # fmt: skip

    browser.open(out / "report.html")  # a reload loses nothing
    browser.run("document.getElementById('start').click()")
    assert browser.run("document.getElementById('progress').textContent") == "8 of 9"
    browser.press("ArrowDown")
    assert browser.run("document.getElementById('asking').hidden && !document.getElementById('answered').hidden")
    browser.press("Escape")
    browser.run("document.getElementById('export').click()")
    browser.until("true")
    file = tmp_path / "votes.json"
    for _ in range(200):
        if file.is_file():
            break
        browser.run("new Promise(done => setTimeout(done, 50))")

    chosen = ["left", "right", "tie", "left", "right", "right", "right", "left", "tie"]
    expected = []
    for (trial, (question, *_)), choice in zip(itertools.product(data["trials"], QUESTIONS), chosen, strict=True):
        side = {"left": trial["sides"][0], "right": trial["sides"][1]}.get(choice)
        answer = "tie" if side is None else "ab"[side]
        place = {"prompt": trial["number"], "image": trial["image"], "a": "base", "b": "mine"}
        expected.append({**place, "question": question, "choice": answer})
    saved = json.loads(file.read_text())
    assert saved["votes"] == expected and saved["key"] == data["key"]

    browser.give_file("#votes-file", file)  # imported beside the own ones
    browser.until("document.getElementById('imported').textContent.includes('9 votes')")
    rows = browser.run("[...document.querySelectorAll('#tally tr')].map(r => [...r.cells].map(c => c.textContent))")
    for row, (question, _, title) in zip(rows, QUESTIONS, strict=True):
        counts = {
            c: 2 * sum(v["choice"] == c for v in expected if v["question"] == question) for c in ("a", "b", "tie")
        }
        assert row[:4] == [title, "mine against base", f"{counts['b']} : {counts['a']}", str(counts["tie"])]
    assert {url.split(":")[0] for url in browser.requests} <= {"file", "data", "blob"}

    assert compare.main(words(out, b=run, votes=[file])) == 0  # merged into the page
    study = json.loads((out / "user_study.json").read_text())
    general = next(row for row in study if row["question"] == "general")
    worth = {"a": 0, "b": 1, "tie": 0.5}
    shares = [worth[v["choice"]] for v in expected if v["question"] == "general"]
    assert general["mean"] == pytest.approx(np.mean(shares)) and general["votes"] == 3
    assert "User study" in (out / "report.html").read_text()
    (out / "user_study.json").unlink()


def test_filters_and_zoom_in_a_browser(browser: Browser, report: tuple[Path, Path]) -> None:
    """By prompt, by largest difference against the scores on file, and pictures by keyboard in their own size."""
    browser.open(report[0] / "report.html")
    seen = "[...document.querySelectorAll('.pair')].filter(p => !p.hidden).map(p => p.querySelector('h3').textContent)"
    assert browser.run(seen) == [NASTY, "a red ring", "a blue cross"]
    browser.run("const f = document.getElementById('filter'); f.value = 'BLUE'; f.dispatchEvent(new Event('input'))")
    assert browser.run(seen) == ["a blue cross"]
    assert browser.run("document.getElementById('matching').textContent") == "1 of 3"
    browser.run("f.value = ''; f.dispatchEvent(new Event('input'))")
    browser.run("const o = document.getElementById('order'); o.value = '0'; o.dispatchEvent(new Event('change'))")
    lines = browser.run("[...document.querySelectorAll('.pair')].map(p => [...p.querySelectorAll('.numbers')].map("
                        "n => n.textContent))")  # fmt: skip
    gaps = [abs(float(a.split()[-1]) - float(b.split()[-1])) for a, b in lines]
    assert gaps == sorted(gaps, reverse=True) and gaps[0] > gaps[-1]
    browser.run("o.value = ''; o.dispatchEvent(new Event('change'))")
    assert browser.run(seen) == [NASTY, "a red ring", "a blue cross"]

    browser.run("document.querySelector('button.zoom').click()")
    assert browser.run("document.getElementById('zoom').open && document.querySelector('#zoom img').width") == 16
    assert browser.run("document.querySelector('#zoom p').textContent") == "base"
    browser.press("ArrowRight")
    assert browser.run("document.querySelector('#zoom p').textContent") == "mine"
    browser.press("Escape")
    browser.until("!document.getElementById('zoom').open")
    browser.until("document.activeElement.querySelector('img')?.id === 'picture-0-1'")  # the keyboard goes on there


@pytest.mark.parametrize(
    ("count", "said"),
    [
        ("{a: 1, b: 1, tie: 3}", "even so far"),
        ("{a: 0, b: 5, tie: 0}", "about 1 more vote"),  # 5 : 0 is chance in 2 of 32
        ("{a: 0, b: 6, tie: 0}", "settled"),
        ("{a: 4, b: 6, tie: 0}", "about 87 more votes"),  # 1.96^2 / 4 / 0.1^2 = 96.04
        ("{a: 40, b: 60, tie: 0}", "settled"),
        ("{a: 2, b: 4, tie: 4}", "about 48 more votes"),  # 0.6 of the votes have a side: 57.6
    ],
)
def test_votes_to_settle(browser: Browser, report: tuple[Path, Path], count: str, said: str) -> None:
    browser.open(report[0] / "report.html")
    assert browser.run(f"toSettle({count})") == said


def test_nothing_is_wider_than_a_phone(browser: Browser, report: tuple[Path, Path], tmp_path: Path) -> None:
    browser.open(report[0] / "report.html")
    browser.look(tmp_path / "narrow.png", 390, 800, "dark")
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    assert browser.run("getComputedStyle(document.documentElement).colorScheme") == "light dark"


# ------------------------------------------------------------------------------------------------------------- votes


def vote(prompt: int, choice: str, question: str = "general", b: str = "b") -> Vote:
    return Vote(prompt, 0, "a", b, question, choice)


def test_user_study_by_hand() -> None:
    votes = [vote(0, "b"), vote(0, "a"), vote(1, "b"), vote(2, "tie"), vote(0, "b", "appeal"), vote(5, "a", b="c")]
    found = user_study(votes, seed=0)
    share, count = found["a", "b"]["general"]
    assert (share.mean, count) == ((0.5 + 1 + 0.5) / 3, 4)
    assert found["a", "b"]["appeal"][0].mean == 1 and "alignment" not in found["a", "b"]
    assert found["a", "c"]["general"][0].mean == 0


def vote_with(name: str, value: str) -> bytes:
    """A whole vote, and one that holds another value in one place."""
    whole = {"prompt": "0", "image": "0", "a": '"x"', "b": '"y"', "question": '"general"', "choice": '"a"'}
    votes = ["{" + ", ".join(f'"{n}": {v}' for n, v in vote.items()) + "}" for vote in (whole, whole | {name: value})]
    return f'{{"key": "k", "votes": [{", ".join(votes)}]}}'.encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "damaged"),
        (b"\xff\xfe", "damaged"),
        (b"[]", "not an object"),
        (b'{"key": "other"}', "another comparison"),
        (b'{"key": "k", "votes": [{"prompt": 1}]}', "vote 1: {'prompt': 1} is not a vote"),
        (b'{"key": "k"}', "its votes are a JSON NoneType, not a list"),
        (vote_with("prompt", "-1"), "vote 2: {'prompt': -1"),
        (vote_with("image", "1"), "vote 2: {'prompt': 0, 'image': 1"),
        (b'{"key": "k", "votes": null}', "its votes are a JSON NoneType, not a list"),
        (b'{"key": "k", "votes": 7}', "its votes are a JSON int"),
        (b'{"key": "k", "votes": {"prompt": 1}}', "its votes are a JSON dict"),
        (b'{"key": "k", "votes": "abc"}', "its votes are a JSON str"),
        (b'{"key": "k", "votes": [null]}', "vote 1: None is not a vote"),
        (b'{"key": "k", "votes": [[]]}', "vote 1: "),
        (b'{"key": "k", "votes": [[1, 2]]}', "vote 1: "),
        *(
            (vote_with(name, value), "vote 2: .* is not a vote")
            for name, value in [
                ("prompt", "[0]"),
                ("prompt", '"0"'),
                ("prompt", "null"),
                ("prompt", "0.5"),
                ("prompt", "true"),
                ("a", "[]"),
                ("image", "{}"),
                ("a", "null"),
                ("b", "1"),
                ("question", "[]"),
                ("question", "{}"),
                ("choice", "[]"),
                ("choice", "null"),
                ("choice", '"c"'),
                ("more", "1"),
                ("a", '"z"'),
                ("b", '"x"'),
            ]
        ),
        (b'{"key": "k", "votes": [{"prompt":0,"image":0,"a":"a","b":"b","question":"q","choice":"a"}]}', "vote 1"),
    ],
)
def test_bad_votes_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "votes.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_votes([tmp_path / "votes.json"], "k", ["x", "y"], {(0, 0)})
    with pytest.raises(FileNotFoundError, match="Export"):
        read_votes([tmp_path / "none.json"], "k", ["x", "y"], {(0, 0)})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ([], "two sides"),
        (["--a", "base", "--b", "base"], "two sides are called base"),
        (["--b", "x", "--lora", "y"], "--lora is for spo_fast.evaluate"),
        (["--b", "x", "--num_shown", "none"], "invalid int value"),
        (["--b", "x", "--nonsense", "1"], "unknown argument '--nonsense'"),
    ],
)
def test_wrong_command_lines(line: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(["--model", "toy", *line]) == 2
    assert message in capsys.readouterr().err
