"""The page of a comparison: pairs side by side, win rates, a blind ballot. It loads nothing from anywhere."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spo_fast.evaluation.contenders import Gallery
from spo_fast.evaluation.image_statistics import IMAGE_STATISTICS, hacking_signs
from spo_fast.evaluation.pages.render import data_url, render
from spo_fast.evaluation.pages.votes import QUESTIONS, Vote, read_votes, user_study
from spo_fast.evaluation.pictures import read_picture
from spo_fast.evaluation.published import published_cells
from spo_fast.evaluation.results import Evaluation
from spo_fast.evaluation.statistics import Interval, bootstrap, win_rate

MAX_GRID_ROWS = 16


@dataclass(frozen=True)
class Comparison:
    """The sides of an evaluation that are compared, in order, and the pictures that are shown."""

    evaluation: Evaluation
    sides: list[Gallery]
    shown: list[int]  # numbers of pictures

    @property
    def names(self) -> list[str]:
        """The sides' names."""
        return [side.contender.name for side in self.sides]

    @property
    def key(self) -> str:
        """Names this comparison: the same for the same pictures of the same sides."""
        digests = [(side.contender.name, side.digest()) for side in self.sides]
        return hashlib.sha256(json.dumps([digests, self.shown]).encode()).hexdigest()[:16]

    def trials(self) -> list[dict[str, Any]]:
        """Every pair of sides on every picture shown, in an order and on sides that the seed decides."""
        import numpy as np

        per, prompts = self.evaluation.cfg.pictures.images_per_prompt, self.evaluation.prompts
        random = np.random.default_rng([self.evaluation.cfg.pictures.seed, len(self.shown)])
        trials = []
        for row, number in enumerate(self.shown):
            for pair in itertools.combinations(range(len(self.sides)), 2):
                sides = list(pair if random.random() < 0.5 else pair[::-1])
                place = {"row": row, "number": number // per, "image": number % per}
                trials.append({**place, "prompt": prompts[number // per], "sides": sides})
        return [trials[i] for i in random.permutation(len(trials))]


def spread(total: int, most: int) -> list[int]:
    """At most `most` numbers below total, evenly apart."""
    return [i * total // min(most, total) for i in range(min(most, total))]


def wins(c: Comparison) -> list[tuple[str, str, list[Interval]]]:
    """(a, b, b's share of the prompts won by each metric) of each two sides."""
    values, seed = c.evaluation.values, c.evaluation.cfg.pictures.seed
    return [
        (a, b, [win_rate(values[b][m], values[a][m], seed) for m in c.evaluation.metrics])
        for a, b in itertools.combinations(c.names, 2)
    ]


def scores(c: Comparison) -> list[tuple[str, list[str]]]:
    """Each side's mean scores."""
    e = c.evaluation
    return [(n, [str(bootstrap(e.values[n][m], e.cfg.pictures.seed)) for m in e.metrics]) for n in c.names]


def image_statistics(c: Comparison) -> tuple[list[tuple[str, list[tuple[str, bool]]]], list[str]]:
    """What no metric should move by itself: how vivid, hard and busy the pictures are, against the base model's.

    Rows of (side, (text, whether it is a sign of reward hacking) of each), and the signs as sentences.
    """
    values, seed = c.evaluation.values, c.evaluation.cfg.pictures.seed
    rows, signs = [], []
    for name in c.names:
        found = hacking_signs(values["base"], values[name], seed)
        signs += [f"{name}: {text}" for text in found.values()]
        cells = []
        for of in IMAGE_STATISTICS:
            ours, base = float(values[name][of].mean()), float(values["base"][of].mean())
            change = f" ({ours / base - 1:+.0%})" if name != "base" and base > 0 else ""
            cells.append((f"{ours:.3g}{change}", of in found))
        rows.append((name, cells))
    return rows, signs


def image_bytes(c: Comparison) -> list[list[tuple[str, bytes]]]:
    """(media type, data) of each picture shown, rows of sides, as wide as the page's size allows."""
    from PIL import Image

    from spo_fast.evaluation.pictures import MAX_IMAGE_BYTES, STRIP_WIDTHS, encoded, narrowed

    for width in STRIP_WIDTHS[1:]:
        rows, size = [], 0
        for number in c.shown:
            images = []
            for side in c.sides:
                with Image.open(side.files[number]) as image:
                    images.append(encoded(narrowed(image.convert("RGB"), width)))
            rows.append(images)
            size += sum(len(data) for _, data in images)
        if size <= MAX_IMAGE_BYTES * 3:  # pairs are what this page is for
            break
    return rows


def pairs(c: Comparison) -> list[tuple[str, list[tuple[str, str, str]], list[float]]]:
    """Prompt after prompt: (side, its scores, its picture as a data URL), and how far apart the sides' scores are."""
    e, per = c.evaluation, c.evaluation.cfg.pictures.images_per_prompt
    blocks, whose = [], f"mean of the prompt's {per}: " if per > 1 else ""
    for number, images in zip(c.shown, image_bytes(c), strict=True):
        prompt = number // per
        figures = [
            (name, whose + ", ".join(f"{m} {e.raw[name][m][prompt]:.4g}" for m in e.metrics), data_url(*image))
            for name, image in zip(c.names, images, strict=True)
        ]
        scores = [[float(e.values[name][m][prompt]) for name in c.names] for m in e.metrics]
        blocks.append((e.prompts[prompt], figures, [max(them) - min(them) for them in scores]))
    return blocks


def page(c: Comparison, votes: list[Vote], num_files: int) -> str:
    """The whole report as HTML."""
    e, s = c.evaluation, c.evaluation.cfg.pictures
    statistics, signs = image_statistics(c)
    return render(
        "comparison.html",
        title=" against ".join(reversed(c.names)),
        small=read_picture(c.sides[0].files[0]).shape[-1] < 128,
        e=e,
        s=s,
        wins=wins(c),
        scores=scores(c),
        published=published_cells(e.cfg.model.model, e.metrics),
        statistics_names=list(IMAGE_STATISTICS),
        statistics=statistics,
        signs=signs,
        study=user_study(votes, s.seed),
        questions=QUESTIONS,
        num_files=num_files,
        pairs=pairs(c),
        total=len(c.sides[0].files),
        data={"key": c.key, "seed": s.seed, "names": c.names, "questions": QUESTIONS, "trials": c.trials()},
        everything=json.dumps({k: e.result[k] for k in ("settings", "versions", "contenders")}, indent=1),
    )


def write_comparison(c: Comparison, votes_files: Sequence[Path] = ()) -> Path:
    """report.html, grid.png and, with votes, user_study.json in the evaluation's directory. Returns the report."""
    from spo_fast.data.files import write_atomically
    from spo_fast.evaluation.pictures import write_grid

    out = Path(c.evaluation.cfg.pictures.output_dir)
    per = c.evaluation.cfg.pictures.images_per_prompt
    votes = read_votes(votes_files, c.key, c.names, {divmod(n, per) for n in c.shown})
    if votes:
        study = user_study(votes, c.evaluation.cfg.pictures.seed)
        found = [
            {"a": a, "b": b, "question": q, **share._asdict(), "votes": count}
            for (a, b), answers in study.items()
            for q, (share, count) in answers.items()
        ]
        write_atomically(out / "user_study.json", json.dumps(found, indent=1) + "\n")
    per, prompts = c.evaluation.cfg.pictures.images_per_prompt, c.evaluation.prompts
    rows = c.shown[:MAX_GRID_ROWS]
    grid = [[read_picture(side.files[n]) for side in c.sides] for n in rows]
    write_grid(out / "grid.png", grid, [prompts[n // per] for n in rows])
    write_atomically(out / "report.html", page(c, votes, len(votes_files)))
    return out / "report.html"
