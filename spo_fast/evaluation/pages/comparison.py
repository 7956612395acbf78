"""The page of a comparison: pairs side by side, win rates, a blind ballot. It loads nothing from anywhere."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from spo_fast.evaluation.contenders import Gallery
from spo_fast.evaluation.pages.votes import QUESTIONS, Vote, read_votes, user_study
from spo_fast.evaluation.pictures import read_picture
from spo_fast.evaluation.results import Evaluation

MAX_GRID_ROWS = 16
CSS = """
.row { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 220px), 1fr)); }
.row { margin-bottom: 1.5rem; align-items: end; } .row img, #vote img { width: 100%; }
.pixels img { image-rendering: pixelated; }
.pixels .row { max-width: 640px; } .table + .table { margin-top: 1.2rem; } #results td { white-space: nowrap; }
.numbers { font-size: .8rem; opacity: .75; }
.bar { display: inline-block; width: 6rem; height: .7em; background: #8884; position: relative; margin-right: .5rem; }
.bar b { position: absolute; inset: 0 auto 0 0; background: #3b82c4; }
.bar i { position: absolute; top: -2px; bottom: -2px; left: 50%; border-left: 1px solid; }
.sign { color: #c2525a; font-weight: 600; } button { font: inherit; padding: .4rem .9rem; margin: .2rem .3rem .2rem 0; }
.voting #results { display: none; } #vote .two { display: grid; gap: 1rem; grid-template-columns: 1fr 1fr; }
#vote .two img { max-height: 70vh; object-fit: contain; } #question { font-size: 1.2rem; }
kbd { border: 1px solid #8888; border-radius: 3px; padding: 0 .3em; font-size: .85em; }
"""


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


def percent(share: Any) -> str:
    """A share with its interval, and a bar."""
    text = f"{share.mean:.0%} [{share.low:.0%}, {share.high:.0%}]"
    return f'<span class="bar"><b style="width:{100 * share.mean:.1f}%"></b><i></i></span>{text}'


def rows_html(head: list[str], rows: list[list[str]]) -> str:
    """A table; cells are HTML already."""
    lines = ["".join(f"<th>{cell}</th>" for cell in head), *("".join(f"<td>{c}</td>" for c in row) for row in rows)]
    return f'<div class="table"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def wins_html(c: Comparison) -> str:
    """Win rates of each two sides, with intervals."""
    from spo_fast.evaluation.statistics import win_rate

    values, seed = c.evaluation.values, c.evaluation.cfg.pictures.seed
    rows = []
    for a, b in itertools.combinations(c.names, 2):
        cells = [percent(win_rate(values[b][m], values[a][m], seed)) for m in c.evaluation.metrics]
        rows.append([f"<b>{escape(b)}</b> against {escape(a)}", *cells])
    return rows_html(["share of prompts won", *map(escape, c.evaluation.metrics)], rows)


def scores_html(c: Comparison) -> str:
    """Each side's mean scores, beside published ones."""
    from spo_fast.evaluation.published import PUBLISHED
    from spo_fast.evaluation.statistics import bootstrap

    e = c.evaluation
    seed, metrics = e.cfg.pictures.seed, e.metrics
    rows = [[escape(n), *(str(bootstrap(e.values[n][m], seed)) for m in metrics)] for n in c.names]
    for name, known in PUBLISHED.get(e.cfg.model.model, {}).items():
        if set(known) & set(metrics):
            cells = [f"{known[m]:.4g}" if m in known else "" for m in metrics]
            rows.append([f"{escape(name)} <span class='numbers'>(published)</span>", *cells])
    return rows_html(["mean score", *map(escape, metrics)], rows)


def looks_html(c: Comparison) -> str:
    """What no metric should move by itself: how vivid, hard and busy the pictures are, against the base model's."""
    from spo_fast.evaluation.looks import LOOKS, hacking_signs

    values, seed = c.evaluation.values, c.evaluation.cfg.pictures.seed
    rows, signs = [], []
    for name in c.names:
        found = hacking_signs(values["base"], values[name], seed)
        signs += [f"{name}: {text}" for text in found.values()]
        cells = []
        for look in LOOKS:
            ours, base = float(values[name][look].mean()), float(values["base"][look].mean())
            change = f" ({ours / base - 1:+.0%})" if name != "base" and base > 0 else ""
            cells.append(f'<span class="{"sign" if look in found else ""}">{ours:.3g}{change}</span>')
        rows.append([escape(name), *cells])
    warning = "".join(f"<li>{escape(text)}</li>" for text in signs)
    warning = f'<div class="warnings"><h2>Signs of reward hacking</h2><ul>{warning}</ul></div>' if signs else ""
    about = "Changes are against the base model. Red: more than a quarter above it, and not by chance."
    return f"{warning}<h2>Looks</h2><p>{about}</p>{rows_html(['mean', *LOOKS], rows)}"


def study_html(votes: list[Vote], seed: int, num_files: int) -> str:
    """What the merged votes say; empty without votes."""
    if not votes:
        return ""
    rows = []
    for (a, b), found in user_study(votes, seed).items():
        cells = [f"{percent(found[q][0])} <span class='numbers'>{found[q][1]} votes</span>" if q in found else "" for
                 q, *_ in QUESTIONS]  # fmt: skip
        rows.append([f"<b>{escape(b)}</b> against {escape(a)}", *cells])
    files = f"{num_files} file{'' if num_files == 1 else 's'} of votes"
    return f"<h2>User study</h2><p>{files}.</p>{rows_html(['preferred by', *(t for *_, t in QUESTIONS)], rows)}"


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


def pairs_html(c: Comparison) -> str:
    """Pictures side by side, prompt after prompt."""
    e, per = c.evaluation, c.evaluation.cfg.pictures.images_per_prompt
    blocks, whose = [], f"mean of the prompt's {per}: " if per > 1 else ""
    for row, (number, images) in enumerate(zip(c.shown, image_bytes(c), strict=True)):
        figures = []
        for side, (name, (kind, data)) in enumerate(zip(c.names, images, strict=True)):
            scores = whose + ", ".join(f"{m} {e.raw[name][m][number // per]:.4g}" for m in e.metrics)
            source = f"data:{kind};base64,{base64.b64encode(data).decode()}"
            figures.append(
                f'<figure><figcaption>{escape(name)} <span class="numbers">{escape(scores)}</span></figcaption>'
                f'<img id="picture-{row}-{side}" alt="{escape(name)}" src="{source}"></figure>'
            )
        blocks.append(f'<h3>{escape(e.prompts[number // per])}</h3><div class="row">{"".join(figures)}</div>')
    return "".join(blocks)


VOTE = """
<section id="vote" hidden>
<p><span id="progress"></span> <button id="undo">undo</button> <button id="stop">back to the report</button></p>
<div id="asking"><p id="question"></p><h3 id="prompt"></h3>
<div class="two"><img id="left" alt="left picture"><img id="right" alt="right picture"></div>
<p><button id="choose-left">left <kbd>&larr;</kbd></button> <button id="choose-tie">no difference <kbd>&darr;</kbd>
</button> <button id="choose-right">right <kbd>&rarr;</kbd></button> <kbd>Backspace</kbd> undoes, <kbd>Esc</kbd> pauses;
1, 0 and 2 do the same as the arrows. Which side is which is told at the end.</p></div>
<div id="answered"><p>Thank you, that was all. What you preferred stands in the report, under Blind vote.</p></div>
</section>
"""
BALLOT = """
<h2>Blind vote</h2>
<p>Every pair shown here, {count} questions, in an order drawn by seed {seed}. Answers are kept in this browser;
exported, they are merged by <code>python -m spo_fast.compare ... --votes votes.json</code>, or here.</p>
<p><button id="start">Vote</button><button id="export">Export votes</button>
<label>Import votes <input type="file" id="votes-file" accept=".json" multiple></label></p>
<p id="imported" class="about"></p>
<div class="table" id="tallied" hidden><table><thead><tr><th>question</th><th>pair</th><th>votes</th><th>ties</th>
<th>share</th></tr></thead><tbody id="tally"></tbody></table></div>
"""


def page(c: Comparison, votes: list[Vote], num_files: int) -> str:
    """The whole report as HTML."""
    from spo_fast.evaluation.pages import run_report

    e, s = c.evaluation, c.evaluation.cfg.pictures
    trials = c.trials()
    data = {"key": c.key, "seed": s.seed, "names": c.names, "questions": QUESTIONS, "trials": trials}
    # inside a script element only "<" could end it
    embedded = json.dumps(data).replace("<", "\\u003c")
    title = " against ".join(reversed(c.names))
    small = read_picture(c.sides[0].files[0]).shape[-1] < 128
    total = len(c.sides[0].files)
    ballot = BALLOT.format(count=len(trials) * len(QUESTIONS), seed=s.seed)
    script = (Path(__file__).parent / "compare.js").read_text(encoding="utf-8")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(title)}</title><style>{run_report.CSS}{CSS}</style></head><body class="{"pixels" if small else ""}">
<h1>{escape(title)}</h1>
<div id="results">
<p class="verdict">{len(e.prompts)} prompts ({escape(e.result["prompts"]["from"])}), {s.images_per_prompt} pictures
each from the same noise, {s.num_steps} steps, guidance {s.guidance_scale:g}.</p>
<p class="about">Brackets are 95 % bootstrap intervals over prompts. A rise of the score that training followed shows
that training works; only eyes show whether it is for the better.</p>
{wins_html(c)}
{scores_html(c)}
{looks_html(c)}
{study_html(votes, s.seed, num_files)}
{ballot}
<h2>Pairs</h2><p>Pictures in a row began as the same noise. Shown: {len(c.shown)} of {total}.</p>
{pairs_html(c)}
<h2>Settings</h2><details><summary>Settings and versions</summary>
<pre>{escape(json.dumps({k: e.result[k] for k in ("settings", "versions", "contenders")}, indent=1))}</pre></details>
</div>
{VOTE}
<script type="application/json" id="data">{embedded}</script>
<script>{script}</script>
</body></html>
"""


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
