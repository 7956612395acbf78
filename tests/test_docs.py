"""What README, docs/ and CONTRIBUTING name exists: paths, links, functions, flags, command lines. README is short."""

from __future__ import annotations

import ast
import functools
import importlib
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spo_fast import train, train_spm
from spo_fast.evaluation.pages.run_record import RunRecord

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "spo_fast"
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "findings/README.md",
    *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md")),
]
DOORS = ("train", "train_spm", "evaluate", "compare", "report")
FOLDERS = "spo_fast|tests|docs|benchmarks|findings|csrc"
ROOMS = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
PARSERS = {"train": train.parse, "train_spm": train_spm.parse}
Names = dict[str, "Names"]


@functools.cache
def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def spans(text: str) -> list[str]:
    """What stands between single backticks, outside blocks of code."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))]


def commands(text: str) -> list[str]:
    """Of blocks of shell code, a line each, and of spans."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, flags=re.S)).replace("\\\n", " ")
    lines = [re.sub(r"\s#.*", "", line).strip() for line in blocks.splitlines()]
    starts = ("python ", "pytest ", "make ", "torchrun ", "bash ")
    return [line for line in lines if line] + [span for span in spans(text) if span.startswith(starts)]


def names_of(tree: ast.AST) -> Names:
    """Functions, classes and variables of a module, those of classes below them."""
    found: Names = {}
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = names_of(node) if isinstance(node, ast.ClassDef) else {}
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            if isinstance(target, ast.Name):
                found[target.id] = {}
    return found


def exists(dotted: str) -> bool:
    """Whether room.module.name, name and so on, is a module, or a name in one."""
    parts = dotted.removeprefix("spo_fast.").split(".")
    for end in range(len(parts), 0, -1):
        path = PACKAGE.joinpath(*parts[:end])
        if path.is_dir() and end == len(parts):
            return True
        if path.with_suffix(".py").is_file():
            names = names_of(ast.parse(path.with_suffix(".py").read_text()))
            for part in parts[end:]:
                if part not in names:
                    return False
                names = names[part]
            return True
    return False


def file_of(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


@functools.cache
def flags_of(module: str) -> frozenset[str]:
    """Those that --help of a door shows; of other commands, those that their file declares."""
    if module.startswith("spo_fast.") and module.split(".")[1] in DOORS:
        import contextlib
        import io

        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
            importlib.import_module(module).main(["--help"])
        return frozenset(re.findall(r"--\w[\w-]*", out.getvalue()))
    calls = [n for n in ast.walk(ast.parse(file_of(module).read_text())) if isinstance(n, ast.Call)]
    words = [a.value for c in calls for a in c.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    return frozenset(word for word in words if word.startswith("--"))


@functools.cache
def all_flags() -> frozenset[str]:
    modules = [f"spo_fast.{door}" for door in DOORS] + [f"spo_fast.toy.{n}" for n in ("build", "claims", "evaluate")]
    modules += [f"benchmarks.{path.stem}" for path in ROOT.glob("benchmarks/*.py")]
    return frozenset().union(*map(flags_of, modules))


def faults_of(command: str) -> list[str]:
    """What is wrong with a command line of ours."""
    words = shlex.split(command)
    paths = [word for word in words if re.match(rf"({FOLDERS})/", word) and "NAME" not in word]
    found = [f"no {path}" for path in paths if not (ROOT / path).exists()]
    if words[0] == "make":
        return [word for word in words[1:] if f"\n{word}:" not in text_of("Makefile")]
    if "-m" not in words or not re.match(r"(spo_fast|benchmarks)\.", module := words[words.index("-m") + 1]):
        return found
    rest = words[words.index("-m") + 2 :]
    if not file_of(module).is_file():
        return [f"no module {module}"]
    flags = [word.split("=")[0] for word in rest if word.startswith("--")]
    found += [f"{module} has no {flag}" for flag in flags if flag not in flags_of(module)]
    parse = PARSERS.get(module.split(".")[1])
    if parse is not None and not found and rest[-1:] != ["..."] and "--model" in rest:
        parse(rest)  # raises where settings do not fit together
    return found


def test_the_checks_find_what_is_wrong():
    assert exists("method.rollout.best_and_worst") and exists("spo_fast.models.diffusion.DiffusionModel.cond")
    assert not exists("method.rollout.best") and not exists("method.roll.best_and_worst")
    assert not exists("models.diffusion.DiffusionModel.best_and_worst")
    assert faults_of("python -m spo_fast.train --model toy --num_candidates 3 --dry_run") == []
    assert faults_of("python -m spo_fast.train --model toy --candidates 3") == ["spo_fast.train has no --candidates"]
    with pytest.raises(ValueError, match="memory"):
        faults_of("python -m spo_fast.train --model toy --memory vast")
    assert faults_of("python -m spo_fast.trainer") == ["no module spo_fast.trainer"]
    assert faults_of("python -m benchmarks.scale RUN --cheque 1") == ["benchmarks.scale has no --cheque"]
    assert faults_of("make demonstration") == ["demonstration"] and faults_of("pytest tests/no.py") == [
        "no tests/no.py"
    ]
    assert commands("a `pytest b` and\n```bash\npython -m c \\\n  --d 1  # e\n```\n") == [
        "python -m c    --d 1",
        "pytest b",
    ]


def test_the_readme_is_short():
    lines = text_of("README.md").splitlines()
    assert len(lines) <= 200
    first = "\n".join(lines[:60])
    screen = "\n".join(lines[:36])
    for what in ("pip install", "--model toy", "my_prompts.txt", "--model sdxl", "load_lora_weights", "epochs"):
        assert what in screen
    for what in ("![", "pip install", "spo_fast.train --model", "load_lora_weights", "agrees to", "make demo"):
        assert what in first


def test_the_readme_leads_from_prompts_to_pictures(tmp_path, monkeypatch):
    """Its training command with the toy in SDXL's place, then its Python as the comment has it for the toy; and the
    code of the run's report. The LoRA is seen in the picture."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "my_prompts.txt").write_text("a red ring\nmy dog on a surfboard\n")
    (line,) = [c for c in commands(text_of("README.md")) if "--prompts my_prompts.txt" in c]
    words = line.replace("sdxl", "toy").replace("my_prompts.txt", str(tmp_path / "my_prompts.txt")).split()[3:]
    out = tmp_path / "run"
    small = ["--num_steps", "4", "--branch_start", "2", "--num_validation_images", "0", "--max_train_steps", "1"]
    assert train.main([*words, "--output_dir", str(out), *small, "--learning_rate", "0.01", "--threshold", "-1"]) == 0
    (code,) = re.findall(r"```python\n(.*?)```", text_of("README.md"), flags=re.S)
    (toys,) = re.findall(r"^# the toy: (.*)$", code, flags=re.M)
    code = re.sub(r"^base, .*$", toys, code, count=1, flags=re.M).replace('"runs/toy"', repr(str(out)))
    pictures = {}
    for name, text in {
        "with": code.replace("lighthouse.png", str(tmp_path / "with.png")),
        "without": re.sub(r"^pipe\.load_lora.*\n", "", code, flags=re.M),
    }.items():
        torch.manual_seed(0)
        exec(text.replace("lighthouse.png", str(tmp_path / f"{name}.png")), {})
        pictures[name] = np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int)
    assert pictures["with"].shape == (16, 16, 3) and abs(pictures["with"] - pictures["without"]).max() > 0
    names: dict[str, object] = {}
    exec(RunRecord.read(out).loading(str(out)), names)
    assert names["image"].size == (16, 16)


def facts_of(page):
    """The page without what its reader is to make: tests/test_outside.py builds that from the text."""
    return re.sub(r"## Add a method\n.*(?=## How to add a model)", "", text_of(page), flags=re.S)


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_exists(page):
    text, missing = facts_of(page), []
    assert spans(text)
    for span in spans(text):
        dotted = re.fullmatch(r"(\w+)(\.\w+)+", span)
        if dotted and dotted[1] in ROOMS | {"spo_fast"} and not re.search(r"\.(py|yaml|jsonl?|html)$", span):
            missing += [] if exists(span) else [span]
    for path in re.findall(rf"(?<![\w/.-])((?:{FOLDERS})/[\w./-]*\w)", text):
        missing += [] if (ROOT / path).exists() or "NAME" in path else [path]
    for path in re.findall(r"`((?:\w+/)*\w+\.py)`", text):
        places = (ROOT, PACKAGE, PACKAGE / "ops", PACKAGE / "models/files", ROOT / "benchmarks")
        missing += [] if any((place / path).is_file() for place in places) else [path]
    assert not missing


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = ((ROOT / page).parent / path).resolve()
            assert target.exists(), link
            headings = re.findall(r"^#+ (.*)$", target.read_text() if anchor else "", flags=re.M)
            slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert not anchor or anchor in slugs, link


@pytest.mark.parametrize("page", PAGES)
def test_command_lines_parse(page):
    assert [f"{command}: {fault}" for command in commands(facts_of(page)) for fault in faults_of(command)] == []


@pytest.mark.parametrize("page", PAGES)
def test_flags_and_variables_exist(page):
    outside = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint"}  # torchrun's
    flags = {flag for span in spans(facts_of(page)) for flag in re.findall(r"(?<![\w-])--\w[\w-]*", span)}
    assert flags - all_flags() <= outside
    sources = "".join(p.read_text() for p in (*ROOT.glob("*.py"), ROOT / "Makefile", *PACKAGE.rglob("*.py")))
    assert all(name in sources for name in re.findall(r"\bSPO_FAST_[A-Z_]+", facts_of(page)))


def test_a_walk_names_twelve_functions_at_most():
    walks = text_of("docs/design.md").split("## A walk: ")[1:]
    named = [[span for span in spans(walk) if exists(span)] for walk in walks]
    assert len(walks) == 2 and all(8 <= len(names) <= 12 for names in named), list(map(len, named))


def test_every_page_can_be_reached_from_the_readme():
    linked = set(re.findall(r"\]\(([\w/]+\.md)", text_of("README.md")))
    assert {page for page in PAGES if page != "README.md"} <= linked
