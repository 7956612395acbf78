"""The model card says what the run's files say, and the upload is checked first, complete, and costs no result."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from runs import flags, leave_grid, leave_run, run_toy

from spo_fast import train
from spo_fast.config.errors import RunError
from spo_fast.evaluation.pages import model_card
from spo_fast.training import setup

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


def card_of(run_dir: Path, repository: str | None = None) -> ModelCard:
    return ModelCard(model_card.write_card(run_dir, repository).read_text(encoding="utf-8"))


def test_card_says_what_the_run_measured(tmp_path: Path) -> None:
    records = [{"pairs": 40, "validation_score": 1.5}, {"pairs": 2, "validation_score": 2.25}]
    settings = {"model": "sdxl", "num_validation_images": 3, "learning_rate": 3e-5, "seed": 7}
    run = leave_run(tmp_path / "mine", records, 1.0, **settings)
    prompts = ["a <b>cat</b>: *bold* | pipe", "ein Fuchs\n# x: y"]
    for name in ("before", "after"):
        leave_grid(run / "samples" / f"{name}.png", np.zeros((8, 8, 3), np.uint8), prompts)
    card = card_of(run, "me/mine")
    assert card.data.base_model == SDXL and card.data.license is None
    assert (card.data.library_name, card.data.pipeline_tag) == ("diffusers", "text-to-image")
    assert {"lora", "spo", "stable-diffusion-xl"} <= set(card.data.tags)
    assert [entry["text"] for entry in card.data.widget] == prompts
    text = " ".join(card.text.split())
    assert "# me/mine" in text and "42 pairs in 2 iterations" in text
    assert "by spm, 6 images (2 prompts) from the same noise, 20 DDIM steps, guidance 5.0: " in text
    assert "before 1, after 2.25 (+1.25)." in text
    assert "| learning_rate | 3e-05 | 1e-05 |" in text and "| seed | 7 | 42 |" in text
    assert "![before](samples/before.png)" in text and "![after](samples/after.png)" in text
    assert r"a &lt;b&gt;cat&lt;/b&gt;: \*bold\* \| pipe" in text and r"ein Fuchs \# x: y" in text and "<b>" not in text
    assert 'pipe.load_lora_weights("me/mine")' in text and "arxiv.org/abs/2406.04314" in text
    assert "not of people" in text


@pytest.mark.parametrize("path", ["/models/sdxl", "mine.safetensors", "./a/b"])
def test_local_base_model_is_no_hub_id(tmp_path: Path, path: str) -> None:
    card = card_of(leave_run(tmp_path / "run", [], model="sdxl", pretrained_model_name_or_path=path))
    assert card.data.base_model is None and path in card.text


def test_directory_that_looks_like_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = leave_run(tmp_path / "run", [], model="sdxl", pretrained_model_name_or_path="some/model")
    assert card_of(run).data.base_model == "some/model"
    (tmp_path / "some" / "model").mkdir(parents=True)
    assert card_of(run).data.base_model is None


def test_names_cannot_leave_their_place_in_the_card(tmp_path: Path) -> None:
    """HTML, a heading, a link and a table's bar in a run's name, a path or a setting stay text."""
    bad = '<script>x</script> "a" & [b](c) | `d`'
    quoted = r'&lt;script&gt;x&lt;/script&gt; "a" &amp; \[b\](c) \| \`d\`'
    settings = {"model": "sdxl", "pretrained_model_name_or_path": bad, "validation_prompt": (bad,)}
    card = card_of(leave_run(tmp_path / bad.replace("/", "|"), [], **settings))
    text, code = card.text.replace("\\|script", "/script"), card.text.split("```")[1]
    assert f"# {quoted}\n" in text and f"trained on {quoted} by" in text
    assert f"| validation_prompt | {quoted} | none |" in text
    assert "<script>" not in card.text.replace(code, "")
    assert [line for line in code.splitlines() if "from_pretrained" in line and json.dumps(bad) in line]


def test_card_of_a_run_without_samples_or_lora(tmp_path: Path) -> None:
    card = card_of(leave_run(tmp_path / "run", [{"pairs": 1}], full_finetune=True))
    assert card.data.base_model is None and "widget" not in card.data.to_dict() and "lora" not in card.data.tags
    assert "No validation score was measured." in card.text and "![" not in card.text and "kohya" not in card.text
    assert 'subfolder="unet"' in card.text


# ------------------------------------------------------------------------------------------------------------ the hub


class Hub:
    """Stands in for HfApi: records calls, or fails as it is told to."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.error: dict[str, Exception] = {}

    def __call__(self) -> Hub:
        return self

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        return self._called("create_repo", repo_id=repo_id, **options) or SimpleNamespace(
            repo_id=repo_id if "/" in repo_id else f"me/{repo_id}"
        )

    def upload_folder(self, **options: Any) -> None:
        self._called("upload_folder", **options)

    def _called(self, name: str, **options: Any) -> None:
        self.calls.append((name, options))
        if name in self.error:
            raise self.error[name]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    return hub


PUSHED = {"push_to_hub": True, "max_train_steps": 1, "num_validation_images": 1}


def test_run_is_uploaded(tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    out = run_toy(tmp_path / "mine", **PUSHED)
    (created, asked), (uploaded, options) = hub.calls
    assert (created, asked) == ("create_repo", {"repo_id": "mine", "exist_ok": True})
    assert uploaded == "upload_folder" and options["repo_id"] == "me/mine" and options["folder_path"] == out
    files = [str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()]
    assert set(filter_repo_objects(files, allow_patterns=options["allow_patterns"])) == {
        *("pytorch_lora_weights.safetensors", "lora_kohya.safetensors", "README.md", "report.html", "config.yaml"),
        *("metrics.jsonl", "samples/before.png", "samples/step-1.png", "samples/after.png", "samples/strengths.png"),
    }
    assert 'load_lora_weights("me/mine")' in (out / "README.md").read_text()
    assert "uploaded to https://huggingface.co/me/mine" in capsys.readouterr().out


def test_nothing_is_pushed_unasked(tmp_path: Path, hub: Hub) -> None:
    run_toy(tmp_path / "run", max_train_steps=1, hub_model_id="me/x")
    assert hub.calls == []


@pytest.mark.parametrize("fault", ["no token", "refused"])
def test_login_is_checked_before_anything_is_loaded(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    if fault == "no token":
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    hub.error["create_repo"] = KeyError("401 Unauthorized\nfor url")
    monkeypatch.setattr(setup, "load_model", lambda *_: pytest.fail("a model was loaded"))
    assert train.main(flags(tmp_path / "run", hub_model_id="them/x", **PUSHED)) == 1
    error = capsys.readouterr().err
    assert "hf auth login" in error and "drop --push_to_hub" in error and error.count("\n") == 1
    assert ("no Hugging Face token" in error) if fault == "no token" else ("cannot write to them/x" in error)
    assert len(hub.calls) == (fault == "refused")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_failed_upload_costs_nothing(tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.error["upload_folder"] = OSError("the line is down")
    out = tmp_path / "my run"
    assert train.main(flags(out, hub_model_id="me/x", **PUSHED)) == 1
    for name in ("pytorch_lora_weights.safetensors", "README.md", "report.html", "checkpoint-1/state.json"):
        assert (out / name).is_file()
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "the line is down" in error
    command = shlex.split(error.split("Repeat it with: ")[1])
    assert command[:5] == ["hf", "upload", "me/x", str(out), "."]
    assert [word for word in command[5:] if word != "--include"] == list(model_card.FILES)


@pytest.mark.parametrize(("version", "times"), [("0.36.0", 1), ("2.4.0", len(model_card.FILES))])
def test_upload_command_suits_the_installed_hf(monkeypatch: pytest.MonkeyPatch, version: str, times: int) -> None:
    """argparse's --include (0.x) takes all patterns and the last one given counts; typer's takes one at a time."""
    monkeypatch.setattr(huggingface_hub, "__version__", version)
    command = shlex.split(model_card.upload_command(Path("run"), "me/x"))
    assert command.count("--include") == times and len(command) == 5 + times + len(model_card.FILES)


def test_upload_error_is_a_run_error(tmp_path: Path, hub: Hub) -> None:
    hub.error["upload_folder"] = RuntimeError("x\ny")
    with pytest.raises(RunError, match="RuntimeError: x y"):
        model_card.upload(tmp_path, "me/x")
