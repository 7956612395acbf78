"""A method and scorers from outside the package, written to the letter as CONTRIBUTING.md has them."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import SMALL, assert_same_end, command_line, facts, flags, killed_run, leave_run, run_toy
from safetensors.torch import save_file
from test_objectives import CFG, log_p, made

from spo_fast import evaluate, train
from spo_fast.config.methods import METHODS, register_method
from spo_fast.config.presets import PRESETS
from spo_fast.config.scorers import SCORERS, scorer_specs
from spo_fast.config.training import ObjectiveConfig
from spo_fast.evaluation.pages.charts import charts_of
from spo_fast.evaluation.pages.model_card import card
from spo_fast.evaluation.pages.run_record import RunRecord
from spo_fast.evaluation.pages.run_report import page
from spo_fast.method.objectives import make_objective
from spo_fast.models.device import Device
from spo_fast.training import loop
from spo_fast.training.monitor.warnings import STILL_ITERATIONS, Watch
from spo_fast.training.plan.fake_networks import fake_scorer, networks_of, run_once
from spo_fast.training.plan.fake_run import predict
from spo_fast.training.plan.fit_memory import choose
from spo_fast.training.plan.once import Once

ROOT = Path(__file__).parent.parent
CODE = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)
IPO, SCORER = "my_ipo:ipo", "my_scorer:brightness"
TAU = "tau" in {f.name for f in dataclasses.fields(ObjectiveConfig)}
own_tau = pytest.mark.skipif(TAU, reason="the package has a setting tau itself, whose type and help the method gets")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with the two files; what they register goes again."""
    known = dict(METHODS), dict(SCORERS)
    METHODS.pop("ipo", None)  # should the package have come to have it
    (tmp_path / "my_ipo.py").write_text(CODE[0])
    (tmp_path / "my_scorer.py").write_text(CODE[1])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for table, before in zip((METHODS, SCORERS), known, strict=True):
        table.clear()  # type: ignore[attr-defined]
        table.update(before)  # type: ignore[attr-defined]
    for module in ("my_ipo", "my_scorer", "mine"):
        sys.modules.pop(module, None)


def refused(capsys: pytest.CaptureFixture[str], line: list[str], *words: str) -> None:
    assert train.main(line) in (1, 2)
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and len(message) <= 300, message
    for word in words:
        assert word in message


# ------------------------------------------------------------------------------------------------------ a method


@own_tau
def test_help_flags_and_presets(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        train.parse(["--method", IPO, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert IPO in text and "--tau FLOAT ipo: the margin that training draws to is 1 / (2 tau). (default: 10.0)" in text
    assert f"Not of ddpo, dpok, stepgrpo, grpo, awm, {IPO}." in text
    ipo = ["--model", "toy", "--method", IPO]
    refused(capsys, [*ipo, "--clip", "0.1"], f"--clip is not read by --method {IPO}")
    refused(capsys, [*ipo, "--beta", "1"], f"--beta is not read by --method {IPO}")
    refused(capsys, [*ipo, "--kl_weight", "1"], "only by dpok, stepgrpo")
    refused(capsys, [*ipo, "--tau", "x"], "--tau='x' is not a number")
    refused(capsys, ["--model", "toy", "--tau", "1"], f"--tau is not read by --method spo, only by {IPO}.")
    for model, rate in (("sd15", 3e-5), ("sdxl", 1e-5), ("toy", 1e-3)):
        cfg = train.parse(["--model", model, "--method", IPO])
        preset, flat = PRESETS[model]().flat(), cfg.flat()
        changed = {name: value for name, value in flat.items() if value != preset[name]}
        assert changed.keys() - {"num_inner_steps"} <= {"method", "learning_rate"} and flat["method"] == IPO
        assert flat["learning_rate"] == rate and flat["tau"] == 10.0
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(train.parse([*ipo, "--tau", "3"]).flat()))
    assert train.parse(["--config", "c.yaml"]).flat()["tau"] == 3.0


def test_what_cannot_be_had_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line = ["--model", "toy", "--output_dir", "runs/x"]
    (tmp_path / "mine.py").write_text("import nowhere_to_be_found\n")
    refused(capsys, [*line, "--method", "my_ipx:ipo"], "no module my_ipx in")
    refused(capsys, [*line, "--method", "my_ipo:ipx"], "my_ipo has no ipx")
    refused(capsys, [*line, "--method", "my_ipo:IPO"], "is a type, not a spo_fast.config.methods.Method")
    refused(capsys, [*line, "--method", "mine:ipo"], "mine needs nowhere_to_be_found")
    refused(capsys, [*line, "--method", "my_ipo.py:ipo"], "a module's name has no .py: my_ipo:ipo.")
    refused(capsys, [*line, "--method", "spx"], "'spx' is none of spo", "Did you mean 'spo'?")
    refused(capsys, [*line, "--scorer", "my_scorex:brightness"], "no module my_scorex in")
    refused(capsys, [*line, "--scorer", "my_scorer:darkness:2"], "my_scorer has no darkness")
    refused(capsys, [*line, "--scorer", "spn:sum"], "no module spn in", "Did you mean 'spm'?")
    refused(capsys, [*line, "--method", "lpo", "--scorer", SCORER], "needs a scorer of noisy latents")
    refused(capsys, [*line, "--scorer", SCORER, "--validation_metrics", SCORER], "is the scorer")
    bad = {"shape": "x.mean((2, 3))", "nan": "x.mean((1, 2, 3)) / 0 * 0", "error": "x.nothing", "text": "'bright'"}
    (tmp_path / "mine.py").write_text("".join(f"def {name}(x, p):\n    return {code}\n" for name, code in bad.items()))
    for name, words in {"shape": "(2, 3) for 2", "nan": "give finite", "error": "AttributeError", "text": ""}.items():
        refused(capsys, [*line, "--scorer", f"mine:{name}"], f"scorer mine:{name}", words)


def test_settings_that_it_cannot_run_with(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The record says so: on the command line, in a YAML file and in Python."""
    only = (
        'import dataclasses, my_ipo\nfour = dataclasses.replace(my_ipo.ipo, misfit=lambda s: "needs num_candidates=4.'
    )
    only += '" if s["num_candidates"] != 4 else "", published=lambda given: {"num_candidates": 4})\n'
    (tmp_path / "mine.py").write_text(only)
    line = ["--model", "toy", "--method", "mine:four"]
    refused(capsys, [*line, "--num_candidates", "3"], "method=mine:four needs num_candidates=4.")
    cfg = train.parse(line)
    with pytest.raises(ValueError, match=r"^method=mine:four needs num_candidates=4\.$"):
        cfg.with_fields(num_candidates=2)
    with pytest.raises(ValueError, match="num_inner_steps must be 0"):
        train.parse(["--model", "toy", "--method", "gradspo"]).with_fields(num_inner_steps=1)


MISTAKES = {  # a line of my_ipo.py and another in its place; words of the error, which is the user's and not ours
    "another word for a setting": (
        "2 * self.tau)).square",
        "2 * self.tua)).square",
        ["AttributeError at my_ipo.py, line"],
    ),
    "the loss alone": ("return loss, torch", "return loss\n        torch", ["IPO.loss must return", "gave ()"]),
    "a statistic too few": (
        'stats = ("terms",',
        'stats = ("terms", "gap",',
        ["(3,) sums", "terms, gap, margin", "(2,)"],
    ),
    "no gradient": (
        "return loss, torch",
        "return loss.detach(), torch",
        ["IPO.loss must return", "() with a gradient"],
    ),
    "a loss a term": (".square().sum()", ".square()", ["IPO.loss must return", "gave (2,) and (2,)"]),
    "no such setting": ('return {"learning_rate"', 'return {"learning_rte"', ["'learning_rte'", "Did you mean"]),
    "a model left out": (', "toy": 1e-3', "", ["`published` of its record ends in KeyError: 'toy'. Mend it."]),
    "a text for a number": ('"toy": 1e-3', '"toy": "fast"', ["learning_rate='fast' is not a number"]),
    "a start of another setting": (
        'settings["tau"]',
        'settings["tua"]',
        ["`start` of its record ends in KeyError: 'tua'"],
    ),
    "no dataclass": (
        "@dataclass(frozen=True, kw_only=True)\nclass IPO(SPO)",
        "class IPO",
        ["IPO needs @dataclass(frozen"],
    ),
    "a default of another type": ("tau: float = 10.0", 'tau: float = "hard"', ["tau='hard' is not a number"]),
    "another's name, another type": (
        "tau: float = 10.0",
        "tau: float = 1.0\n    clip: str = 's'",
        ["IPO.clip is a setting"],
    ),
    "another's name, out of its range": (
        "tau: float = 10.0",
        "tau: float = 1.0\n    gamma: float = 3.0",
        ["IPO.gamma", "(0, 1]"],
    ),
    "a method's name": ('name="ipo"', 'name="spo"', ["spo is a method already: name the record otherwise"]),
}


@pytest.mark.parametrize(
    "mistake", [pytest.param(m, marks=own_tau) if m == "a default of another type" else m for m in MISTAKES]
)
def test_a_mistake_in_it_is_told_as_the_users(
    mistake: str, here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right, wrong, words = MISTAKES[mistake]
    assert right in CODE[0]
    (here / "my_ipo.py").write_text(CODE[0].replace(right, wrong))
    refused(capsys, flags(tmp_path / "run", method=IPO, max_train_steps=1, learning_rate=None), *words)


@own_tau
def test_a_setting_needs_no_docstring(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = CODE[0].replace('    """ipo: the margin that training draws to is 1 / (2 tau)."""\n', "")
    (here / "undocumented.py").write_text(code)
    with pytest.raises(SystemExit):
        train.parse(["--method", "undocumented:ipo", "--help"])
    assert "--tau FLOAT Of IPO. (default: 10.0)" in " ".join(capsys.readouterr().out.split())


def test_a_run_that_trained_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_toy(tmp_path / "run", threshold=0.999, max_train_steps=1)
    assert "warning: nothing was trained" in capsys.readouterr().out


def test_its_loss_is_ipos() -> None:
    """(log r_w - log r_l - 1 / (2 tau))^2 in float64, and its gradient with respect to the outputs."""
    cfg = train.parse(["--model", "toy", "--method", IPO, "--tau", "0.2"])
    _, steps, e, m = made("spo", 0.1)
    loss, stats = make_objective(cfg.objective).loss(m, steps, e, CFG, 0.5)
    margins = [
        sum((1, -1)[k] * (log_p(m, steps, e, n, k, 0) - log_p(e.frozen, steps, e, n, k, 0)) for k in range(2))
        for n in range(len(e))
    ]
    torch.testing.assert_close(loss, 0.5 * sum((margin - 2.5) ** 2 for margin in margins), rtol=1e-9, atol=1e-10)
    assert stats.tolist() == pytest.approx([len(e), float(sum(margins))])


def test_card_report_and_warnings(tmp_path: Path) -> None:
    train.parse(["--method", IPO, "--model", "toy"])
    records = [{"pairs": 4, "loss": 0.0025 + 1e-4 * i, "margin": 0.0, "clamped": 0.0} for i in range(3)]
    run = RunRecord.read(leave_run(tmp_path / "run", records, method=IPO))
    text = card(run, None)
    assert "A General Theoretical Paradigm" in text and "2310.12036" in text and "2406.04314" not in text
    assert "by IPO with spo_fast" in text and "\n- ipo\n" in text and "\n- spo\n" not in text
    html = page(run)
    assert (
        "of a policy that has learnt nothing: 0.0025 (dotted, if near)" in html
        and "the difference of the log-ratios" in html
    )
    assert "beta times" not in html
    watch = Watch(train.parse(["--method", IPO, "--model", "toy", "--tau", "5"]))
    told = [text for _ in range(STILL_ITERATIONS) for text in watch.look({"pairs": 4, "loss": 0.01})]
    assert len(told) == 1 and "has 0.0100. Raise --learning_rate" in told[0]


@pytest.mark.parametrize(
    "method, loss, near",
    [("ddpo", 1e-4, True), ("ddpo", 0.5, False), ("spo", 0.69, True), ("mapo", 0.5, False), (IPO, 0.0024, True)],
)
def test_the_axis_of_a_loss_fits_its_curve(tmp_path: Path, method: str, loss: float, near: bool) -> None:
    """The curve fills most of the chart's height, and the start's line is there only where it is in reach."""
    train.parse(["--method", IPO, "--model", "toy"])
    records = [
        {"pairs": 4, "loss": loss * (1 + 0.01 * i) if near and loss > 1e-3 else loss * (i - 1)} for i in range(4)
    ]
    if not near:
        records = [{"pairs": 4, "loss": loss + 1e-3 * i} for i in range(4)]
    html = page(RunRecord.read(leave_run(tmp_path / "run", records, method=method)))
    svg = html.split('aria-label="Loss"')[1].split("</svg>")[0]
    assert ('id="level"' in svg) == near
    path = re.search(r'id="curve-loss">\s*<path d="([^"]*)"', svg)
    assert path is not None
    heights = [float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", path[1])]
    assert max(heights) - min(heights) > 0.25 * 2.4 * 72


def test_charts_of_every_method_follow_its_record() -> None:
    flat = PRESETS["toy"]().flat()
    levels = {m: next(c.level for c in charts_of(r, flat) if c.title == "Loss") for m, r in METHODS.items()}
    ln2 = pytest.approx(0.693147, abs=1e-6)
    want: dict[str, Any] = dict.fromkeys(("spo", "mspo", "d3po", "lpo", "gradspo", "dense", "dpo"), ln2)
    want |= {**dict.fromkeys(("ddpo", "dpok", "stepgrpo", "grpo", "awm"), 0.0), "nft": None, "mapo": None}
    assert {m: levels[m] for m in want} == want
    shares = {m for m, r in METHODS.items() if "valid_share" in {c.fields[0] for c in charts_of(r, flat)}}
    assert shares & want.keys() == {"spo", "mspo", "d3po", "lpo", "gradspo"}  # others compare no pairs of a rollout


@pytest.mark.parametrize("resumed", ["killed"])
def test_two_steps_resumed_bit_identically_with_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resumed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {"method": IPO, "scorer": ["spm:0.7", f"{SCORER}:0.3"], "tau": 2.0}
    settings |= {"checkpointing_steps": 1, "max_train_steps": 2}
    whole = run_toy(tmp_path / "whole", **settings)
    killed = killed_run(tmp_path / resumed, monkeypatch, 1, **settings)
    run_toy(killed, resume_from_checkpoint="latest", **settings)
    assert_same_end(whole, killed)
    assert all(r["pairs"] > 0 and "loss" in r for r in facts(whole))
    assert facts(whole)[0]["loss"] == pytest.approx(1 / 16, rel=0.1)  # the start, and a few updates
    saved = yaml.safe_load((whole / "config.yaml").read_text())
    assert saved["method"] == IPO and saved["tau"] == 2.0 and saved["scorer"] == settings["scorer"]
    assert SCORER in (whole / "README.md").read_text() and SCORER in (whole / "report.html").read_text()
    (tmp_path / "my_scorer.py").unlink()
    sys.modules.pop("my_scorer")
    SCORERS.pop(SCORER)
    capsys.readouterr()
    line = ["--config", str(killed / "config.yaml"), "--resume_from_checkpoint", "latest"]
    refused(capsys, line, f"--scorer {SCORER}: no module my_scorer in")


def test_registered_in_python() -> None:
    import my_ipo

    register_method(my_ipo.ipo)
    assert train.parse(["--model", "toy", "--method", "ipo", "--tau", "4"]).flat()["tau"] == 4.0
    assert isinstance(make_objective(ObjectiveConfig(method="spo")), object)
    with pytest.raises(ValueError, match="already"):
        register_method(dataclasses.replace(my_ipo.ipo, name="spo"))
    with pytest.raises(ValueError, match="rank is a setting already"):
        register_method(dataclasses.replace(my_ipo.ipo, name="taken", objective=Taken))
        train.parse(["--model", "toy"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Taken:
    rank: int = 1


# ------------------------------------------------------------------------------------------------------ scorers


def test_names_and_weights() -> None:
    assert scorer_specs((f"{SCORER}:0.3", "spm", SCORER)) == [(SCORER, 0.3), ("spm", 1.0), (SCORER, 1.0)]
    with pytest.raises(ValueError, match="the weight after the colon must be a number"):
        scorer_specs((f"{SCORER}:much",))


def test_its_scores_in_a_run_are_the_functions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In Python, judging in a range of noise: what it was shown is the pictures, in [0, 1], with their prompts."""
    seen: list[tuple[torch.Tensor, list[str]]] = []

    def mine(pictures: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        seen.append((pictures, prompts))
        return pictures.mean(dim=(1, 2, 3))

    line = flags(tmp_path / "run", branch_end=3, max_train_steps=1)
    loop.train(train.parse(line), scorer=mine)
    assert all(p.min() >= 0 and p.max() <= 1 and p.shape[1] == 3 and len(p) == len(t) for p, t in seen)
    means = torch.cat([p.mean(dim=(1, 2, 3)) for p, _ in seen[1:]])  # the first was the check
    assert facts(tmp_path / "run")[0]["score_mean"] == pytest.approx(float(means.mean()), rel=1e-5)
    name = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["scorer"]
    assert name == ["test_outside:mine"] and "test_outside:mine" in (tmp_path / "run" / "README.md").read_text()


def test_predicted_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def cost(*more: str) -> Any:
        return predict(train.parse([*command_line(SMALL), *more]), None, "cpu")

    both, spm, own = cost("--method", IPO, "--scorer", "spm", SCORER), cost("--scorer", "spm"), cost("--scorer", SCORER)
    assert both.unknown == own.unknown == (SCORER,) and spm.unknown == ()
    assert both.full_flops == spm.full_flops and "score" not in own.full_flops
    assert own.resident.keys() < spm.resident.keys()
    for scorer, said in (("spm", False), (SCORER, True)):
        cfg = train.parse([*command_line(SMALL), "--scorer", scorer])
        _, choices = choose(cfg, Device("a GPU", "cuda", 2**34))
        fits = [choice.reason for choice in choices if "GiB predicted" in choice.reason]
        assert fits and all((f", without {SCORER}, whose memory is not known" in why) is said for why in fits)
    assert train.main([*flags(tmp_path / "run", scorer=SCORER), "--dry_run"]) == 0
    assert len(re.findall(rf"scorer {SCORER} +unknown, not counted", capsys.readouterr().out)) == 2


def test_as_a_metric(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of an evaluation, and held out of a run. Prompts of one's own leave the toy's true scores out."""
    run = run_toy(tmp_path / "run", max_train_steps=1, num_validation_images=1, validation_metrics=SCORER)
    assert f"held_out_{SCORER}" in facts(run)[-1] and f"| {SCORER} |" in (run / "README.md").read_text()
    (tmp_path / "p.txt").write_text("a cat\na dog\n")
    line = ["--model", "toy", "--prompts", "p.txt", "--num_steps", "2", "--images_per_prompt", "1", "--output_dir", "e"]
    assert evaluate.main([*line, "--metrics", "pickscore", "layout"]) == 1
    assert "true scores know captions of the toy's world only, not 'a cat'" in capsys.readouterr().err
    assert not Path("e").exists()
    assert evaluate.main(line) == 0
    out = capsys.readouterr().out
    assert "left out: layout and aesthetics" in out and "pickscore" in out
    assert evaluate.main([*line, "--metrics", SCORER]) == 0
    assert f"base: {SCORER}" in capsys.readouterr().out


def test_a_scorer_with_weights_in_the_package(tmp_path: Path) -> None:
    """Its file and its record, to the letter; flag, help and run follow."""
    left_out = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "spo_fast", tmp_path / "spo_fast", ignore=left_out)
    (tmp_path / "spo_fast" / "scorers" / "warmth.py").write_text(CODE[2])
    records = tmp_path / "spo_fast" / "config" / "scorers.py"
    before = '        ScorerRecord(name="layout"'
    records.write_text(records.read_text().replace(before, f"{CODE[3].rstrip()},\n{before}"))
    save_file({"weight": torch.tensor([1.0, 0.0, -1.0])}, tmp_path / "warmth.safetensors")

    def run(*line: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
        words = [sys.executable, "-m", "spo_fast.train", *line]
        done = subprocess.run(words, env=environment, cwd=tmp_path, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "--warmth_path STR Local warmth.safetensors." in " ".join(run("--help").split())
    out = run(*flags(tmp_path / "w", scorer="warmth", warmth_path="warmth.safetensors", max_train_steps=2))
    assert "2/2" in out and facts(tmp_path / "w")[1]["pairs"] > 0


# ------------------------------------------------------------------------------------------------------ costs


@torch.no_grad()
def test_image_reward_costs_what_its_layers_multiply() -> None:
    """2 x multiply-adds written out: BLIP-L on 196 patches and a class token, BERT-base on 35 words that read them."""
    T, L, d, w = 197, 35, 1024, 768
    vision = 24 * (2 * T * 12 * d * d + 4 * T * T * d) + 2 * (T - 1) * 3 * 16 * 16 * d
    words = 2 * L * 4 * w * w + 4 * L * L * w + 2 * L * 8 * w * w
    reading = 2 * L * 2 * w * w + 2 * T * 2 * d * w + 4 * L * T * w
    head = 2 * (w * 1024 + 1024 * 128 + 128 * 64 + 64 * 16 + 16)
    once = Once()
    scorer = run_once(fake_scorer("image_reward", {}, torch.float32, True), once)
    with once.live:
        scorer.score_pixels(once.empty(1, 3, 64, 64, dtype=torch.float32), torch.tensor(0), scorer.encode(["a"]))
    assert once.tally["score"] == {"samples": 1, "flops": vision + 12 * (words + reading) + head}


@torch.no_grad()
def test_genevals_detector_is_no_clip() -> None:
    """Swin-S Mask2Former has 69 M parameters (its paper's table), and looks at pictures singly."""
    once = Once()
    scorer = run_once(fake_scorer("geneval", {}, torch.float32, True), once)
    detector, clip = (sum(p.numel() for p in network.parameters()) for network in networks_of(scorer))
    assert detector == pytest.approx(69e6, rel=0.01) and clip == pytest.approx(428e6, rel=0.01)
    with once.live:
        scorer.score_pixels(once.empty(3, 3, 64, 64, dtype=torch.float32), torch.tensor(0), scorer.encode([""] * 3))
    assert once.tally["score"]["samples"] == 3 and len(once._seen) == 1


def test_an_unknown_network_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCORERS, "clip", dataclasses.replace(SCORERS["clip"], network="vit-x"))
    with pytest.raises(ValueError, match="scorer clip is costed as 'vit-x': known are vit-h"):
        fake_scorer("clip", {}, torch.float32, True)
