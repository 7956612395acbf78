"""Prompt files in every format, their errors, and the sampler's purity."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spo_fast.data.prompt_order import PromptSampler, epoch_permutation
from spo_fast.data.prompts import BUILTIN_PROMPTS, count_repeats, load_prompts

REPOSITORY = Path(__file__).parents[1]
PROMPTS = ["a red fox", 'a sign that says "open, late"', "Zürich at night, 夜景", "a red fox"]


def write(path: Path, content: str, encoding: str = "utf-8") -> Path:
    path.write_text(content, encoding=encoding, newline="")
    return path


def write_parquet(path: Path, columns: dict) -> Path:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)
    return path


# ---- the built-in prompts ----


def test_builtin_prompts_are_many_distinct_and_short():
    prompts = load_prompts(None)
    assert len(prompts) >= 1200
    assert len({prompt.lower() for prompt in prompts}) == len(prompts)
    lengths = [len(prompt.split()) for prompt in prompts]
    assert min(lengths) >= 3 and max(lengths) <= 40
    # every CLIP token covers a whole word, a punctuation mark or a piece of a word: 4 letters a piece is pessimistic
    pieces = [sum(-(-len(w) // 4) for w in re.findall(r"\w+|[^\w\s]", prompt)) for prompt in prompts]
    assert max(pieces) <= 75


def test_builtin_prompts_are_plain_lines():
    lines = BUILTIN_PROMPTS.read_text(encoding="ascii").splitlines()
    assert lines == load_prompts(None)  # nothing skipped, nothing to strip
    upper = sum(line[0].isupper() for line in lines) / len(lines)
    assert 0.3 < upper < 0.7  # both habits of users are there
    assert not [line for line in lines if "  " in line or "{" in line or re.search(r"\b[Aa] [aeio]\w", line)]


# ---- formats ----


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_text(tmp_path, newline, encoding):
    lines = ["# a comment", PROMPTS[0], "", f"  {PROMPTS[1]} ", "   ", *PROMPTS[2:], ""]
    assert load_prompts(write(tmp_path / "p.txt", newline.join(lines), encoding)) == PROMPTS


def test_json_strings_and_published_format(tmp_path):
    assert load_prompts(write(tmp_path / "a.json", json.dumps(PROMPTS))) == PROMPTS
    published = [{"caption": prompt, "trainset_idx": i} for i, prompt in enumerate(PROMPTS)]
    assert load_prompts(write(tmp_path / "b.json", json.dumps(published, indent=4), "utf-8-sig")) == PROMPTS


def test_jsonl(tmp_path):
    lines = [json.dumps({"text": PROMPTS[0]}), "", json.dumps(PROMPTS[1])]
    lines += [json.dumps({"text": prompt}, ensure_ascii=False) for prompt in PROMPTS[2:]]
    assert load_prompts(write(tmp_path / "p.jsonl", "\n".join(lines) + "\n")) == PROMPTS


def test_csv_and_tsv(tmp_path):
    quoted = ['"' + prompt.replace('"', '""') + '"' for prompt in PROMPTS]
    for suffix, delimiter in ((".csv", ","), (".TSV", "\t")):
        rows = [f"id{delimiter}prompt", *(f"{i}{delimiter}{prompt}" for i, prompt in enumerate(quoted))]
        assert load_prompts(write(tmp_path / f"p{suffix}", "\r\n".join(rows), "utf-8-sig")) == PROMPTS


def test_parquet(tmp_path):
    path = write_parquet(tmp_path / "p.parquet", {"jpg_0": [b"\xff"] * 4, "caption": PROMPTS, "note": list("abcd")})
    assert load_prompts(path) == PROMPTS
    assert load_prompts(str(path), column="note") == list("abcd")


def test_column_order_and_choice(tmp_path):
    path = write(tmp_path / "p.json", json.dumps([{"text": "c", "prompt": "b", "caption": "a", "other": "d"}]))
    assert load_prompts(path) == ["a"]
    assert load_prompts(path, column="other") == ["d"]


def test_count_repeats():
    assert count_repeats(PROMPTS) == 1
    assert count_repeats(["a", "a", "a", "b"]) == 2
    assert count_repeats([]) == 0


# ---- errors: the file, the line, and how to mend it ----


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "# only a comment\n\n", r"p\.txt: no prompts"),
        ("p.json", "[]", r"p\.json: no prompts"),
        ("p.json", '{"caption": "a"}', r"p\.json: the file holds dict, not a list"),
        ("p.json", '["a",\n "b"\n "c"]', r"p\.json, line 3, column 2: not JSON"),
        ("p.json", '["a", 7]', r"p\.json, entry 2: a prompt must be a string, found 7"),
        ("p.json", '["a", " "]', r"p\.json, entry 2: the prompt is empty"),
        ("p.json", '[{"caption": "a"}, {"title": "b"}]', r"entry 2: no column caption or prompt or text; found title"),
        ("p.jsonl", '"a"\n\n{"text": "b"', r"p\.jsonl, line 3, column \d+: not JSON"),
        ("p.jsonl", '"a"\n{"text": null}', r"p\.jsonl, line 2: a prompt must be a string, found None"),
        ("p.csv", "a red fox\na cat\n", r"p\.csv, line 1: no column caption or prompt or text; found a red fox"),
        ("p.csv", "prompt,id\na cat, sitting,3\n", r"p\.csv, line 2: more cells than the header's 2.*double quotes"),
        ("p.csv", "id,prompt\n1,a\n2\n", r"p\.csv, line 3: a prompt must be a string, found None"),
        ("p.csv", 'prompt\n"a" cat\n', r"p\.csv, line 2: .*Mend the quoting"),
        ("p.csv", "", r"p\.csv, line 1: no column caption or prompt or text; found none"),
        ("p.csv", "prompt\n", r"p\.csv: no prompts"),
        ("p.parquet", "not parquet", r"p\.parquet: not a whole parquet file"),
        ("p.yaml", "- a", r"p\.yaml: cannot read prompts from a \.yaml file\. Use \.txt, \.json"),
    ],
)
def test_errors_name_the_place(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_prompts(write(tmp_path / name, content))
    assert str(tmp_path) in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.txt does not exist"):
        load_prompts(tmp_path / "none.txt")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(FileNotFoundError, match="is a folder"):
        load_prompts(tmp_path / "folder.json")


def test_wrong_encoding(tmp_path):
    with pytest.raises(ValueError, match=r"p\.txt: byte 1 is not UTF-8.*Save the file as UTF-8"):
        load_prompts(write(tmp_path / "p.txt", "Zürich", "latin-1"))


def test_named_column_must_exist(tmp_path):
    with pytest.raises(ValueError, match=r"entry 1: no column title; found caption"):
        load_prompts(write(tmp_path / "p.json", '[{"caption": "a"}]'), column="title")
    with pytest.raises(ValueError, match="has no columns"):
        load_prompts(write(tmp_path / "p.txt", "a"), column="title")
    with pytest.raises(ValueError, match=r"schema: no column caption.*found id"):
        load_prompts(write_parquet(tmp_path / "p.parquet", {"id": [1]}))


def test_parquet_null(tmp_path):
    with pytest.raises(ValueError, match=r"row 2: a prompt must be a string"):
        load_prompts(write_parquet(tmp_path / "p.parquet", {"caption": ["a", None]}))


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    path = write(tmp_path / "p.parquet", "x")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install spo_fast\[data\]"):
        load_prompts(path)


def test_reading_prompts_imports_neither_torch_nor_pyarrow():
    code = (
        "import sys, spo_fast.data.prompts as d; d.load_prompts(None); print({'torch', 'pyarrow'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert result.stdout.strip() == "set()"


# ---- the sampler ----


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("num", "batch_size"), [(1, 1), (10, 3), (12, 4), (5, 5), (7, 100)])
def test_epoch_covers_every_prompt_once(num, batch_size, drop_last):
    if drop_last and batch_size > num:
        with pytest.raises(ValueError, match="leaves no batch"):
            PromptSampler(num, batch_size, seed=0, drop_last=drop_last)
        return
    sampler = PromptSampler(num, batch_size, seed=0, drop_last=drop_last)
    assert sampler.iterations_per_epoch == (num // batch_size if drop_last else (num + batch_size - 1) // batch_size)
    for epoch in range(3):
        batches = [sampler.batch(epoch * sampler.iterations_per_epoch + i) for i in range(sampler.iterations_per_epoch)]
        drawn = [index for batch in batches for index in batch.indices]
        assert drawn == epoch_permutation(num, 0, epoch).tolist()[: len(drawn)]
        assert len(set(drawn)) == len(drawn) == (num // batch_size * batch_size if drop_last else num)
        assert {batch.epoch for batch in batches} == {epoch}
        assert [batch.position for batch in batches] == list(range(len(batches)))
        assert [batch.last_in_epoch for batch in batches] == [False] * (len(batches) - 1) + [True]
        assert all(len(batch.indices) == batch_size for batch in batches[:-1])


def test_batch_is_pure():
    """The same in any order of calls, from a fresh sampler (a resume), and untouched by torch's global generator."""
    expected = [PromptSampler(23, 4, seed=5).batch(i) for i in range(40)]
    sampler = PromptSampler(23, 4, seed=5)
    calls = [i for i in range(40) for _ in range(2)]
    random.Random(0).shuffle(calls)
    for i in calls:
        torch.manual_seed(i)
        before = torch.get_rng_state()
        batch = sampler.batch(i)
        assert torch.equal(torch.get_rng_state(), before)
        assert batch == expected[i]
        batch.indices.clear()  # a caller's change must not reach the next call


def test_orders_differ_between_epochs_and_seeds():
    def drawn(batch_size: int, seed: int, epoch: int) -> list[int]:
        sampler = PromptSampler(50, batch_size, seed)
        n = sampler.iterations_per_epoch
        return [index for i in range(epoch * n, (epoch + 1) * n) for index in sampler.batch(i).indices]

    orders = {tuple(drawn(7, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16  # in particular (seed 0, epoch 1) is not (seed 1, epoch 0)
    assert tuple(range(50)) not in orders
    assert drawn(7, 0, 0) == drawn(3, 0, 0)  # keyed by (seed, epoch) only


def test_order_is_uniform_enough():
    """Each prompt comes first about equally often: 2000 epochs of 4 prompts, each 500 +- 5 standard deviations (19)."""
    firsts = torch.tensor([PromptSampler(4, 1, seed=1).batch(4 * epoch).indices[0] for epoch in range(2000)])
    assert (torch.bincount(firsts, minlength=4) - 500).abs().max() < 97


def test_without_shuffle():
    sampler = PromptSampler(5, 2, seed=3, shuffle=False)
    assert [sampler.batch(i).indices for i in range(4)] == [[0, 1], [2, 3], [4], [0, 1]]


def test_sampler_errors():
    with pytest.raises(ValueError, match="must both be at least 1"):
        PromptSampler(0, 1, seed=0)
    with pytest.raises(ValueError, match="must both be at least 1"):
        PromptSampler(1, 0, seed=0)
    with pytest.raises(ValueError, match="iteration=-1"):
        PromptSampler(1, 1, seed=0).batch(-1)
