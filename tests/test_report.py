"""report.html: that it loads nothing, stays small, escapes what people wrote and draws the numbers that were logged."""

from __future__ import annotations

import ast
import math
import re
import shlex
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from browser import Browser
from jinja2 import UndefinedError
from PIL import Image
from runs import leave_grid, leave_run, run_toy

from spo_fast import evaluate, report
from spo_fast.config.presets import PREFERENCE_PRESETS
from spo_fast.evaluation.pages import charts, run_record, run_report
from spo_fast.evaluation.pages.history import History
from spo_fast.evaluation.pages.render import environment, render
from spo_fast.evaluation.statistics import student
from spo_fast.training import run
from spo_fast.training.verdicts import Shown, Validation


class Page(HTMLParser):
    """What a page loads or links to, its tags, and the text people see."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(html)
        self.text = "".join(self.words)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        wanted = ("src", "srcset", "href", "xlink:href", "data", "poster", "action", "background")
        self.loads += [(name, value or "") for name, value in attrs if name in wanted]
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def written(run_dir: Path) -> tuple[str, Page]:
    html = run_report.write_report(run_dir).read_text(encoding="utf-8")
    return html, Page(html)


def points(html: str, field: str) -> list[np.ndarray]:
    """(n, 2) SVG coordinates of a curve, an array for each part between gaps."""
    group = html[html.index(f'id="curve-{field}"') :]
    path = re.search(r'<path d="([^"]*)"', group).group(1)
    parts = [re.findall(r"[ML] (\S+) (\S+)", part) for part in re.split("(?=M)", path) if part.strip()]
    return [np.array(part, dtype=float) for part in parts]


def assert_drawn(parts: list[np.ndarray], x: Any, y: Any) -> None:
    """The points are (x, y) up to a shift and a scale of each axis, y upwards."""
    drawn = np.concatenate(parts)
    assert len(drawn) == len(x)
    for column, values, direction in ((0, np.asarray(x, float), 1), (1, np.asarray(y, float), -1)):
        slope, shift = np.polyfit(values, drawn[:, column], 1)
        assert slope * direction > 0
        np.testing.assert_allclose(drawn[:, column], slope * values + shift, atol=1e-3)


def test_a_runs_reports_read_no_record_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a run take what it logs, a resumed one reads its log once; the pages are what the log alone gives."""
    read: list[int] = []
    parsed = run_record.read_metrics

    def counted(path: str | Path) -> list[dict[str, Any]]:
        records = parsed(path)
        read.append(len(records))
        return records

    for module in (run_record, run):
        monkeypatch.setattr(module, "read_metrics", counted)
    out, pages = tmp_path / "run", []
    settings = {"max_train_steps": 4, "num_train_epochs": 100, "validation_steps": 1, "num_validation_images": 1}
    settings |= {"validation_prompt": ["a red ring"], "checkpointing_steps": 2}
    write = run.write_report
    monkeypatch.setattr(run, "write_report", lambda *given: pages.append(write(*given).read_text(encoding="utf-8")))
    monkeypatch.setattr("spo_fast.training.outputs.write_card", lambda *given: None)
    run_toy(out, curves=True, **settings)
    assert len(pages) == 4 and read == []
    assert run_report.write_report(out).read_text(encoding="utf-8") == pages[-1] and read == [4]
    run_toy(out, curves=True, **settings | {"max_train_steps": 6, "resume_from_checkpoint": "latest"})
    assert len(pages) == 6 and read == [4, 4]
    assert run_report.write_report(out).read_text(encoding="utf-8") == pages[-1]


def test_a_history_is_what_its_records_say() -> None:
    """Against sums and searches over all records."""
    records: list[dict[str, Any]] = [
        {"iteration": i, "epoch": i // 3, "pairs": [4, 0, None][i % 3], "rollout_ms": 10.5 + i, "loss": 0.1 * i}
        | ({"held_out_clip": None if i == 7 else float(i), "hacking": "sharp" * (i == 3)} if i % 2 else {})
        | ({"nonfinite": {"loss": "nan"}, "loss": None, "warnings": ["w"]} if i in (2, 5) else {})
        for i in range(8)
    ]
    history = History()
    for record in records:
        history.add(record)
    assert history.pairs == 4 * 3 and history.milliseconds == sum(r["rollout_ms"] for r in records)
    assert history.epoch_starts == [3, 6] and history.signs == ""
    assert history.latest("held_out_clip") == 5.0 and history.latest("none") is None
    told = ("w", "loss was not finite")
    assert history.warnings == {text: (text, 3, 2, 6) for text in told}
    done, loss = history.curve("loss")
    assert done.tolist() == list(range(1, 9)) and np.isnan(loss[[2, 5]]).all() and loss[7] == 0.1 * 7
    assert history.curve("held_out_clip")[0].tolist() == [2, 4, 6, 8]
    assert history.filled("loss").tolist() == [0.0, 0.1, 0.0, 0.1 * 3, 0.1 * 4, 0.0, 0.1 * 6, 0.1 * 7]


# ------------------------------------------------------------------------------------------------------------- curves


def test_curves_are_the_logged_numbers(tmp_path: Path) -> None:
    loss = [0.693, 0.7, 0.66, 0.68, 0.6]
    html, page = written(leave_run(tmp_path / "run", [{"loss": v, "grad_norm": 3 - v} for v in loss]))
    assert_drawn(points(html, "loss"), [1, 2, 3, 4, 5], loss)
    assert_drawn(points(html, "grad_norm"), [1, 2, 3, 4, 5], [3 - v for v in loss])
    assert "Loss" in page.text and "Gradient norm" in page.text
    assert "Accuracy" not in page.text and "Saturation" not in page.text  # not logged


def test_validation_scores_begin_before_training(tmp_path: Path) -> None:
    records = [{}, {"validation_score": 2.0}, {}, {"validation_score": 4.5}]
    html, page = written(leave_run(tmp_path / "run", [{"pairs": 3, "rollout_ms": 30e3, **r} for r in records], 1.5))
    assert_drawn(points(html, "validation_score"), [0, 2, 4], [1.5, 2.0, 4.5])
    assert "Validation score 1.5 before, 4.5 after (+3); 12 pairs in 4 iterations, 2 min 0 s." in page.text


def test_long_curves_are_means_and_bands(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=3000)
    html, _ = written(leave_run(tmp_path / "run", [{"loss": v} for v in values]))
    tens, x = values.reshape(300, 10), np.arange(1, 3001).reshape(300, 10)
    assert_drawn(points(html, "loss"), x.mean(1), tens.mean(1))
    found = charts.binned(np.arange(1.0, 3001), values)
    np.testing.assert_allclose(found, (x.mean(1), tens.mean(1), tens.min(1), tens.max(1)))
    assert "PolyCollection" in html  # the band
    assert len(html) < 1_000_000


def test_null_is_a_gap(tmp_path: Path) -> None:
    loss = [1.0, 2.0, None, 4.0, 3.0]
    records = [{"loss": v, "margin": None} | ({"nonfinite": {"loss": "nan"}} if v is None else {}) for v in loss]
    html, page = written(leave_run(tmp_path / "run", [*records, {}]))
    parts = points(html, "loss")
    assert [len(part) for part in parts] == [2, 2]
    assert_drawn(parts, [1, 2, 4, 5], [1.0, 2.0, 4.0, 3.0])
    assert "Margin" not in page.text  # never a number
    assert "loss was not finite (iteration 3)" in page.text


def test_spikes_do_not_flatten_a_curve(tmp_path: Path) -> None:
    norms = [1.0 + i % 2 for i in range(200)]
    norms[77] = 5000.0
    html, page = written(leave_run(tmp_path / "run", [{"grad_norm": v} for v in norms]))
    y = points(html, "grad_norm")[0][:, 1]
    assert abs(y[0] - y[1]) > 30  # of about 140 units
    assert "from 1 to 5e+03: spikes are cut off" in page.text


def test_phases_are_stacked(tmp_path: Path) -> None:
    html, page = written(leave_run(tmp_path / "run", [{"rollout_ms": 3000.0, "step_ms": 1000.0}] * 3))
    heights = [np.ptp(np.concatenate(points(html, name))[:, 1]) for name in ("rollout_ms", "step_ms")]
    assert heights[0] == pytest.approx(3 * heights[1], rel=1e-3)
    assert "rollout" in page.text and "rollout_ms" not in page.text


def test_epochs_are_marked(tmp_path: Path) -> None:
    html, _ = written(leave_run(tmp_path / "run", [{"loss": 0.1 * i, "epoch": i // 3} for i in range(9)]))
    assert html.count('id="epoch"') == 2
    html, _ = written(leave_run(tmp_path / "many", [{"loss": 0.1 * i, "epoch": i // 3} for i in range(300)]))
    assert html.count('id="epoch"') <= charts.MAX_EPOCH_MARKS


@pytest.mark.parametrize("records", [[], [{"loss": 0.5, "rollout_ms": 5.0}], [{"loss": None}], [{}, {}]])
def test_short_logs(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    html, page = written(leave_run(tmp_path / "run", records))
    assert f"No validation score yet; 0 pairs in {len(records)} iteration" in page.text
    assert ("<svg" in html) == any(value is not None for r in records for value in r.values())
    assert ("Nothing was logged yet" in page.text) == ("<svg" not in html)


def test_no_log_at_all(tmp_path: Path) -> None:
    run = leave_run(tmp_path / "run", [])
    (run / "metrics.jsonl").unlink()
    assert "Nothing was logged yet" in written(run)[1].text


def test_changes_stand_with_their_intervals(tmp_path: Path) -> None:
    """A fall of 0.031, known to 0.039, is no fall; the bars are the intervals."""
    errors = {"half_validation_score": 0.2, "half_held_out_layout": 0.039, "validation_prompts": 4}
    errors["validation_images"] = 32
    records = [{"validation_score": 1.0 + i, "held_out_layout": 1 - 0.0155 * i, **errors} for i in (1, 2)]
    run = leave_run(tmp_path / "run", records, 1.0)
    (run / "samples" / "before.json").write_text(
        '{"score": 1.0, "values": {"score": [1.0, 1.0], "layout": [1.0, 1.0]}}'
    )
    html, page = written(run)
    assert "1 before, 3 after (+2 ± 0.2, 95 %, 4 prompts, 32 pictures)" in page.text and "held_out_score" not in html
    assert "<td>layout</td><td>1</td><td>0.969</td><td>-0.031 ± 0.039: may be chance</td>" in html
    assert "<td>score</td><td>1</td><td>3</td><td>+2 ± 0.2</td>" in html
    group = html[html.index('id="error-validation_score"') :]
    heights = [abs(float(a) - float(b)) for a, b in re.findall(r'd="M \S+ (\S+) \s*L \S+ (\S+)', group)[:3]]
    curve = points(html, "validation_score")[0][:, 1]
    scale = (curve[0] - curve[2]) / 2  # of the drawing, a unit of the score
    np.testing.assert_allclose(heights, [0, 2 * 0.2 * scale, 2 * 0.2 * scale], rtol=1e-3)


def test_intervals_are_of_the_prompts_paired_changes() -> None:
    """A prompt's pictures change together, so they are one value: of 2 prompts with 2 pictures each there are 2."""
    two: Shown = {"prompts": ["a", "b"]}
    before = Validation(2.0, {"score": [1.0, 2.0, 3.0, 2.0], "saturation": [0.5, 0.5, 0.25, 0.75]}, two)
    now = Validation(3.0, {"score": [2.0, 3.0, 4.0, 5.0], "saturation": [0.5, 0.75, 0.5, 0.75]}, two)
    found = now.intervals([], before)
    # changes 1, 1 | 1, 3: means 1 and 2, s = 0.5 ** 0.5, s / sqrt(2) = 0.5, t with 1 degree of freedom 12.706
    assert found["half_validation_score"] == pytest.approx(12.706 * 0.5, rel=1e-4)
    # 0, 0.25 | 0.25, 0: both 0.125, whatever the pictures do
    assert found["half_look_saturation"] == pytest.approx(0, abs=1e-9)
    assert (found["validation_prompts"], found["validation_images"]) == (2, 4)
    assert now.change("score", before).high == pytest.approx(1.5 + found["half_validation_score"])
    assert Validation(3.0, {"score": [3.0, 4.0]}, {"prompts": ["a"]}).intervals([], None) == {}


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (7, 2.3646), (15, 2.1314), (100, 1.9840)],
)
def test_students_quantile(freedom: int, quantile: float) -> None:
    """Tables and the density: Gamma((n+1)/2) / (sqrt(n pi) Gamma(n/2)) (1 + t^2/n)^(-(n+1)/2)."""
    assert student(freedom) == pytest.approx(quantile, abs=4e-4)
    t = np.linspace(-quantile, quantile, 200_001)
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    density = scale * (1 + t**2 / freedom) ** (-(freedom + 1) / 2)
    assert (density[1:] + density[:-1]).sum() / 2 * (t[1] - t[0]) == pytest.approx(0.95, abs=1e-4)


def test_no_path_of_the_machine(tmp_path: Path) -> None:
    run = leave_run(tmp_path / "run", [{"loss": 0.5}], prompt_cache_dir=str(tmp_path / "cache"))
    assert str(tmp_path) not in written(run)[0]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def test_slider_zoom_and_folds_in_a_browser(browser: Browser, tmp_path: Path) -> None:
    run = leave_run(tmp_path / "run", [{"loss": 0.7, "validation_score": 1.25}] * 3, 0.5, num_validation_images=2)
    for k, name in enumerate(("before", "step-2", "after")):
        leave_grid(run / "samples" / f"{name}.png", np.full((600, 1200, 3), 40 * k, np.uint8), ["first"])
    browser.open(run_report.write_report(run), ready="!!document.getElementById('zoom')")
    place = "document.querySelector('.slider').style.getPropertyValue('--at')"
    assert browser.run(place) == "50%"
    browser.run("document.querySelector('.slider input').focus()")
    browser.press("ArrowRight")
    assert browser.run(place) == "51%"
    assert browser.run("[...document.querySelectorAll('details')].every(d => !d.open)")
    texts = browser.run("document.body.innerText")
    assert texts.index("Pictures") < texts.index("Verdict") < texts.index("Curves") < texts.index("Is it learning?")
    browser.run("document.querySelector('button.zoom').click()")
    assert browser.run("document.querySelector('#zoom img').width") == 1200  # its own size, whatever the page's
    browser.press("ArrowRight")
    assert browser.run("document.querySelector('#zoom p').textContent") == "after: 1.25"
    browser.press("Escape")
    browser.until("!document.getElementById('zoom').open")
    for scheme in ("light", "dark"):
        browser.look(tmp_path / f"{scheme}.png", 390, 800, scheme)
        assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    assert {url.split(":")[0] for url in browser.requests} <= {"file", "data"}


# --------------------------------------------------------------------------------------------------- the page as such


def test_page_loads_nothing_and_escapes(tmp_path: Path) -> None:
    bad = '<script>alert("1")</script> & <img src=http://x/y.png onerror=z>'
    warned = [{"loss": 0.6, "warnings": [f"look {bad}"]}] * 3
    run = leave_run(tmp_path / "a<i>b&c", warned, 1.0, validation_prompt=(bad,), hub_model_id='"><b>')
    for name in ("before", "after"):
        leave_grid(run / "samples" / f"{name}.png", np.full((20, 40, 3), 99, np.uint8), [bad])
    html, page = written(run)
    assert page.tags.count("script") == 1 and not {"link", "iframe", "object", "embed", "i", "base"} & set(page.tags)
    assert page.tags.count("img") == 2 + 1 and page.tags.count("html") == 1
    assert page.loads and all(value.startswith("data:image/" if name == "src" else "#") for name, value in page.loads)
    assert "@import" not in html and not re.search(r"url\((?!#)", html)
    assert page.text.count(bad) >= 4  # heading, table, all settings, warning
    assert f"look {bad} (iteration 1 and 2 later, last 3)" in page.text
    assert "a<i>b&c" in page.text and html.lower().count("</html>") == 1
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'\"" in html
    assert 'name="viewport"' in html and "color-scheme: light dark" in html


def test_warnings_that_differ_in_numbers_alone_are_one(tmp_path: Path) -> None:
    """By its last words. A run of 2,000 iterations had a screen full of one."""
    said = [f"scores differ by {gap} on average; --threshold {gap / 2:g} would keep a third" for gap in (0.04, 0.02)]
    records = [{"loss": 0.6, "warnings": [said[0]]}, {"loss": 0.6}, {"loss": 0.6, "warnings": ["other", said[1]]}]
    html, _ = written(leave_run(tmp_path / "run", records, 1.0))
    assert f"{said[1]} (iteration 1 and 1 later, last 3)" in html and said[0] not in html
    assert "other (iteration 3)" in html


@pytest.mark.parametrize(("prompts", "size"), [(2, 1024), (4, 400), (40, 64)])
def test_stays_under_ten_megabytes(tmp_path: Path, prompts: int, size: int) -> None:
    """Noise, which no format compresses, in as many grids as are shown."""
    records = [{"validation_score": 0.1 * i} for i in range(6)]
    run = leave_run(tmp_path / "run", records, 0.0)
    pixels = np.random.default_rng(0).integers(0, 256, (prompts * size, 4 * size, 3), np.uint8)
    for name in ("before", *(f"step-{i}" for i in range(1, 7)), "after"):
        leave_grid(run / "samples" / f"{name}.png", pixels, [f"prompt {i}" for i in range(prompts)])
    html, page = written(run)
    assert len(html.encode()) < 10_000_000
    assert page.tags.count("img") == min(prompts, 16) * 6 + 1  # and where they open
    assert ("16 of 40 prompts" in page.text) == (prompts == 40)


def test_grids_show_their_own_rows(tmp_path: Path) -> None:
    """Each prompt's block holds that prompt's row of each grid, in order."""
    import base64
    import io

    run = leave_run(tmp_path / "run", [{"validation_score": 1.25}] * 3, 0.5)
    for k, name in enumerate(("before", "step-2", "step-3", "after")):
        pixels = np.zeros((20, 30, 3), np.uint8)
        pixels[:10], pixels[10:] = 10 + k, 100 + k
        leave_grid(run / "samples" / f"{name}.png", pixels, ["first", "second"])
    html, page = written(run)
    colours = []
    for _, source in page.loads:
        if source.startswith("data:"):
            image = Image.open(io.BytesIO(base64.b64decode(source.split(",")[1])))
            assert image.size == (30, 10)
            colours.append(np.asarray(image.convert("RGB")).mean())
    # before, after, what lies between; step-3 is what after shows
    np.testing.assert_allclose(colours, [10, 13, 11, 100, 103, 101], atol=1)
    assert page.text.index("first") < page.text.index("second")
    assert page.text.count("before: 0.5") == page.text.count("iteration 2: 1.25") == page.text.count("after: 1.25") == 2
    assert "3 of 3 grids" in page.text


def test_grids_during_are_spread_and_the_latest_is_there(tmp_path: Path) -> None:
    run = leave_run(tmp_path / "run", [{}] * 100)
    for n in range(10, 101, 10):
        leave_grid(run / "samples" / f"step-{n}.png", np.zeros((8, 8, 3), np.uint8), ["p"])
    leave_grid(run / "samples" / "before.png", np.zeros((8, 8, 3), np.uint8), ["another prompt"])
    shown, count = run_report.grids(run_record.RunRecord.read(run))
    assert [label for label, _ in shown] == ["before", "iteration 30", "iteration 60", "iteration 80", "iteration 100"]
    assert count == 11
    assert "another prompt" not in written(run)[1].text  # it cannot stand beside the others


def test_settings_that_differ_from_the_preset(tmp_path: Path) -> None:
    run = leave_run(tmp_path / "run", [], model="sdxl", learning_rate=3e-5, validation_prompt=("a cat", "a dog"))
    html, page = written(run)
    assert run_record.RunRecord.read(run).changed() == {
        "learning_rate": (1e-5, 3e-5),
        "validation_prompt": ([], ["a cat", "a dog"]),
    }
    assert "<td><code>learning_rate</code></td><td>1e-05</td><td>3e-05</td>" in html
    assert "<td>none</td><td>a cat, a dog</td>" in html
    assert "All as in the preset" in written(leave_run(tmp_path / "other", []))[1].text


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"model": "toy"}, 'StableDiffusionXLPipeline.from_pretrained(toy_files()["model"], **settings)'),
        ({"model": "sd15"}, 'StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5"'),
        (
            {"model": "sdxl", "pretrained_model_name_or_path": "/m/x.safetensors"},
            'StableDiffusionXLPipeline.from_single_file("/m/x.safetensors"',
        ),
        ({"model": "sd35", "height": 512}, 'pipe("a prompt", height=512, width=512, num_inference_steps='),
        ({"model": "toy-flow"}, "settings |= dict(text_encoder_3=None, tokenizer_3=None)"),
        ({"model": "toy-flow"}, "num_inference_steps=10, guidance_scale=2.0, max_sequence_length=0).images[0]"),
        # FluxPipeline's guidance_scale is what the network is told: 3.5 by default, as in training
        ({"model": "flux"}, 'pipe("a prompt", height=512, width=512, num_inference_steps=6).images[0]'),
        ({"model": "flux", "embedded_guidance": 2.0}, "num_inference_steps=6, guidance_scale=2.0).images[0]"),
        (
            {"model": "flux", "guidance_scale": 4.0, "max_sequence_length": 128},
            'num_inference_steps=6, negative_prompt="", true_cfg_scale=4.0, max_sequence_length=128).images[0]',
        ),
        (
            {"model": "sd35", "full_finetune": True, "pretrained_model_name_or_path": "/m/x.safetensors"},
            'SD3Transformer2DModel.from_pretrained("W", subfolder="transformer", torch_dtype=torch.float16)',
        ),
        (
            {"model": "flux", "pretrained_model_name_or_path": "/m/x.safetensors"},
            'FluxTransformer2DModel.from_single_file("/m/x.safetensors", config="black-forest-labs/FLUX.1-dev"',
        ),
        ({"model": "sdxl", "full_finetune": True}, 'UNet2DConditionModel.from_pretrained("W", subfolder="unet"'),
    ],
)
def test_loading_is_python(tmp_path: Path, settings: dict[str, Any], line: str) -> None:
    code = run_record.RunRecord.read(leave_run(tmp_path / "run", [], **settings)).loading("W")
    compile(code, "snippet", "exec")
    assert line in code
    assert ('pipe.load_lora_weights("W")' in code) != settings.get("full_finetune", False)


def test_names_cannot_leave_their_strings(tmp_path: Path) -> None:
    """Quotes, backslashes and calls in a path or a directory are part of the name in the Python that loads it."""
    base, weights = '/m/"+exit()+"\\.safetensors', 'runs/"); exit("\\n'
    run = leave_run(tmp_path / "run", [], model="sdxl", pretrained_model_name_or_path=base)
    tree = ast.parse(run_record.RunRecord.read(run).loading(weights))
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    assert base in texts and weights in texts
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "exit"]


def test_a_name_that_no_page_is_given_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="'title' is undefined"):
        render("page.html")
    assert "<b>&lt;i&gt;</b>" in environment().from_string("<b>{{ x }}</b>").render(x="<i>")


def test_a_power_of_ten_stands_within_the_chart(tmp_path: Path) -> None:
    """A policy gradient's loss: matplotlib writes 1e-7 above the axis, which the picture's edge cut through."""
    html, page = written(leave_run(tmp_path / "run", [{"loss": 1e-7 * v} for v in (2, 6, 5)]))
    assert "1e\N{MINUS SIGN}7" in page.text
    place = re.search(
        r'transform="translate\(\S+ (\S+)\)"[^>]*>1e\N{MINUS SIGN}7<|y="(\S+)"[^>]*>1e\N{MINUS SIGN}7<', html
    )
    assert place is not None and float(place[1] or place[2]) > 8.5  # its base line is a letter's height below the edge


# ------------------------------------------------------------------------------------------------------- command line


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = leave_run(tmp_path / "run", [{"loss": 1.0}])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 1, "lo')  # killed while it wrote
    assert report.main([str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert "in 1 iteration," in (run / "report.html").read_text()
    assert not list(run.glob(".*tmp"))


def test_other_directories_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path)]) == 1
    assert re.fullmatch(r"error: .* holds no run: it has no config.yaml. .*--output_dir.\n", capsys.readouterr().err)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(PREFERENCE_PRESETS["toy"]().flat()))
    assert report.main([str(tmp_path)]) == 1
    assert "no run of spo_fast.train" in capsys.readouterr().err


def test_loading_a_v_prediction_file_says_so(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    for name, metadata in (("v", {"modelspec.prediction_type": "v"}), ("eps", {})):
        file = tmp_path / f"{name}.safetensors"
        save_file({"x": np.zeros(1)}, file, metadata)
        run = leave_run(tmp_path / name, [], model="sdxl", pretrained_model_name_or_path=str(file))
        code = run_record.RunRecord.read(run).loading("W")
        compile(code, "snippet", "exec")
        assert ('prediction_type="v_prediction"' in code) is (name == "v")


def test_a_reports_pictures_are_drawn_again_by_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each stands under its seed and number, and the command in the page makes the same pixels, before and after."""
    monkeypatch.chdir(tmp_path)
    prompts = ["a red ring", "  two, 'quoted'\n\"lines\" #"]
    run_toy(Path("run"), num_validation_images=2, validation_prompt=prompts, max_train_steps=1, seed=7, num_steps=5)
    _, page = written(Path("run"))
    marks = re.findall(r"seed 7, no\. (\d)", page.text)
    assert marks == ["0", "1", "2", "3"]  # a line above each prompt's slider
    command = page.text[page.text.index("python -m spo_fast.evaluate") :].split("\n")[0]
    assert evaluate.main(shlex.split(command)[3:]) == 0
    for name, folder in (("before", "base"), ("after", "run")):
        grid = np.asarray(Image.open(f"run/samples/{name}.png"))
        for number in range(4):
            row, column = divmod(number, 2)
            cell = grid[
                row * 100 + 2 : row * 100 + 98 : 12, column * 100 + 2 : column * 100 + 98 : 12
            ]  # 8 pixels as 96
            drawn = np.asarray(Image.open(f"redrawn/{folder}/{row:05d}-{column}.png")).astype(int)
            assert drawn.shape == cell.shape and abs(drawn - cell).max() <= 1, (name, number)
    assert (
        np.asarray(Image.open("redrawn/base/00000-0.png")) != np.asarray(Image.open("redrawn/run/00000-0.png"))
    ).any()
