"""Prompts to evaluate on: a file, or one of the sets that published tables use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, cast

from spo_fast.config.errors import did_you_mean
from spo_fast.config.evaluation import EvaluationConfig
from spo_fast.config.sections import TOYS
from spo_fast.data.hub import offline_reason
from spo_fast.data.prompts import READERS, load_prompts, parse_json, read_lines

Clause = TypedDict(
    "Clause",
    {"class": str, "count": int, "color": str, "position": tuple[str, int]},  # in JSON a list: relation, whose number
    total=False,
)
"""What must be, or must not be, in a picture."""


class Wanted(TypedDict, total=False):
    """A line of GenEval's evaluation_metadata.jsonl."""

    tag: str  # the task
    include: list[Clause]
    exclude: list[Clause]
    prompt: str


@dataclass(frozen=True)
class PromptSet:
    """A published set of prompts, and where it can be had."""

    what: str
    count: int
    repository: str | None  # a data set of the hub; None: only elsewhere
    files: tuple[str, ...]  # patterns
    column: str | None = None
    quoted: bool = True  # its table, if it is one
    where: str = ""  # it can be had from, if there is no repository


PROMPT_SETS = {
    "pickapic": PromptSet(
        "Pick-a-Pic's unique validation prompts",
        500,
        "pickapic-anonymous/pickapic_v1",
        ("data/validation_unique-*.parquet",),
        "caption",
    ),
    "hpsv2": PromptSet(
        "HPSv2's benchmark",
        3200,
        "zhwang/HPDv2",
        tuple(f"benchmark/{style}.json" for style in ("anime", "concept-art", "paintings", "photo")),
    ),
    "parti": PromptSet("PartiPrompts", 1632, "nateraw/parti-prompts", ("PartiPrompts.tsv",), "Prompt", quoted=False),
    "geneval": PromptSet(
        "GenEval's prompts",
        553,
        None,
        ("evaluation_metadata.jsonl",),
        "prompt",
        where="prompts/ of github.com/djghosh13/geneval",
    ),
}


def prompt_files(spec: str) -> tuple[PromptSet | None, list[Path]]:
    """The set that `spec` names, if any, and its files: "a.txt", "hpsv2" or "hpsv2=folder" (or a file of that set).

    Raises FileNotFoundError saying where a set that is not here can be had.
    """
    name, _, place = spec.partition("=")
    if name not in PROMPT_SETS:
        if Path(spec).suffix.lower() not in READERS:
            near = did_you_mean(name, PROMPT_SETS)
            known = ", ".join(PROMPT_SETS)
            raise ValueError(f"--prompts {spec} is neither a file of prompts ({', '.join(READERS)}) nor {known}.{near}")
        return None, [Path(spec)]
    prompts = PROMPT_SETS[name]
    if place and Path(place).is_file():
        return prompts, [Path(place)]
    folder, why = (Path(place), f"{place} lacks it") if place else _from_hub(prompts)
    files = []
    for pattern in prompts.files:
        found = sorted({*folder.glob(pattern), *folder.glob(pattern.split("/")[-1])}) if folder else []
        if not found:
            source = f"the data set {prompts.repository}" if prompts.repository else prompts.where
            raise FileNotFoundError(
                f"--prompts {spec}: {prompts.what} ({prompts.count:,}) are not here: {why}. Get {pattern} from "
                f"{source} and give --prompts {name}=FOLDER."
            )
        files += found
    return prompts, files


def _from_hub(prompts: PromptSet) -> tuple[Path | None, str]:
    """(its snapshot, why it may be empty)."""
    from huggingface_hub import snapshot_download

    if prompts.repository is None:
        return None, "the hub has no copy"
    offline = offline_reason()
    try:
        folder = snapshot_download(
            prompts.repository,
            repo_type="dataset",
            allow_patterns=list(prompts.files),
            local_files_only=offline is not None,
        )
    except Exception as error:  # each hub client raises another HTTP library's errors
        return None, offline or " ".join(str(error).split())[:200]
    return Path(folder), "the data set has no such file"


def read_prompts(prompts: PromptSet | None, files: list[Path], column: str | None) -> list[str]:
    """Raises ValueError for a set that is not whole, or as load_prompts does."""
    column = column or (prompts.column if prompts else None)
    quoted = prompts is None or prompts.quoted
    texts = [text for file in files for text in load_prompts(file, column, quoted)]
    if prompts and len(texts) != prompts.count:
        names = ", ".join(map(str, files))
        raise ValueError(f"{names}: {len(texts):,} prompts, but {prompts.what} are {prompts.count:,}. Get them again.")
    return texts


def geneval_records(file: str | Path | None) -> dict[str, Wanted]:
    """Prompt -> what GenEval looks for in its pictures, in the file's order. Raises ValueError naming the line."""
    if file is None or Path(file).suffix.lower() != ".jsonl":
        raise ValueError("geneval has to know what to look for: give --prompts evaluation_metadata.jsonl, GenEval's.")

    found: dict[str, Wanted] = {}
    for number, line in enumerate(read_lines(Path(file)), 1):
        if not line.strip():
            continue
        parsed, where = parse_json(Path(file), line, number), f"{file}, line {number}:"
        if not isinstance(parsed, dict) or not {"tag", "include", "prompt"} <= parsed.keys():
            raise ValueError(f"{where} lacks tag and include, by which GenEval judges. Get evaluation_metadata.jsonl.")
        record = cast(Wanted, parsed)
        clauses = [*record["include"], *record.get("exclude", ())]
        if odd := next((c for c in clauses if c.get("class") not in CLASSES or not c.get("count")), None):
            raise ValueError(f"{where} {odd!s:.80} needs a count and one of COCO's 80 classes, as GenEval calls them.")
        if found.setdefault(record["prompt"].strip(), record) != record:
            raise ValueError(f"{where} another line asks something else for the same prompt. Delete one.")
    return found


CLASSES = (  # COCO's 80 in its order, as GenEval calls them
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip


def prompts_of(cfg: EvaluationConfig) -> tuple[list[str], str]:
    """(prompts, what they are)."""
    c = cfg.pictures
    if c.prompts is None and cfg.model.model in TOYS:
        from spo_fast.data import toy_world

        texts, name = toy_world.TEST, "the toy's test prompts"
    elif c.prompts is None:
        from spo_fast.data.prompts import load_prompts

        texts, name = load_prompts(None), "built-in list"
    else:
        known, files = prompt_files(c.prompts)
        texts = read_prompts(known, files, c.caption_column)
        name = known.what if known else files[0].name
    return texts[: c.max_prompts], name
