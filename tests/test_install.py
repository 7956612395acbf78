"""What pip installs, the files of configs/, and the steps of the Dockerfile."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import tomllib

from spo_fast import train
from spo_fast.__main__ import COMMANDS, USAGE
from spo_fast.models.device import Device
from spo_fast.training.plan.fake_run import predict
from spo_fast.training.plan.fit_memory import choose

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(ROOT.glob("configs/*.yaml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_there_is_one_for_each_model_and_card() -> None:
    wanted = {f"{m}_{size}gb" for m in ("sd15", "sdxl", "sd35", "flux") for size in (16, 24, 48, 80)}
    # FLUX.1's transformer in 4 bits and T5 in 8 stand together while prompts are encoded: more than 16 GB
    assert {path.stem for path in CONFIGS} == wanted - {"flux_16gb"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_read(path: Path) -> None:
    """Its own command line, in its first line, names it."""
    cfg = train.parse(["--config", str(path)])
    assert path.stem.startswith(cfg.model.model + "_")
    assert f"--config configs/{path.name} " in path.read_text().splitlines()[0]


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_fits_its_card(path: Path) -> None:
    """As the dry run predicts it; 1 GB is 10^9 bytes, of which a card's context and fragments are left free."""
    size = int(re.fullmatch(r"\w+?_(\d+)gb", path.stem)[1])  # type: ignore[index]
    card = Device(f"a card of {size} GB", "cuda", size * 10**9, capability=(8, 0))
    cfg, _ = choose(train.parse(["--config", str(path)]), card)
    assert card.usable_bytes is not None and predict(cfg).peak <= card.usable_bytes


def test_linux_gets_what_a_card_needs() -> None:
    on_linux = [d for d in PROJECT["dependencies"] if "platform_system == 'Linux'" in d]
    assert {re.split(r"[>=;]", d)[0] for d in on_linux} == {"triton", "bitsandbytes", "nvidia-ml-py"}
    assert PROJECT["scripts"] == {"spo-fast": "spo_fast.__main__:run"} and set(COMMANDS) >= {"train", "report"}
    assert PROJECT["optional-dependencies"]["cuda"] == ["xformers>=0.0.35"]


def test_the_dockerfile_copies_what_is_there_and_installs_extras_that_are() -> None:
    text = (ROOT / "Dockerfile").read_text()
    for copied in re.findall(r"^COPY (?!--)(\S+) ", text, flags=re.M):
        assert (ROOT / copied).exists(), copied
    extras = re.search(r"'\.\[([\w,]+)\]'", text)
    assert extras and set(extras[1].split(",")) <= PROJECT["optional-dependencies"].keys()
    assert all(re.fullmatch(r"nvidia/cuda:13\.\S+", image) for image in re.findall(r"^FROM (\S+)", text, flags=re.M))
    ignored = (ROOT / ".dockerignore").read_text().split()
    needed = ("pyproject.toml", "setup.py", "CMakeLists.txt", "csrc", "spo_fast", "README.md", "LICENSE")
    assert not set(ignored) & set(needed)


def first_stage(text: str) -> list[str]:
    """The commands that a stage runs, continued lines as one."""
    lines = text.split("\nFROM ")[1].replace("\\\n", " ").splitlines()
    return [line.removeprefix("RUN ") for line in lines if line.startswith("RUN ")]


def test_the_steps_of_the_dockerfile_are_those_that_are_tried() -> None:
    steps = first_stage((ROOT / "Dockerfile").read_text())
    assert [step.split()[0] for step in steps] == ["apt-get", "python3", "pip", "SPO_FAST_BUILD_CUDA=1"]


@pytest.mark.slow
def test_the_steps_of_the_dockerfile_run(tmp_path: Path) -> None:
    """In a plain environment beside the sources that it copies, without the system's packages and the extra cuda,
    whose CUDA build of PyTorch has gigabytes; the kernels are built where there is nvcc. Then the entry point."""
    place, sources = tmp_path / "place", tmp_path / "src"
    patterns = (ROOT / ".dockerignore").read_text().split()

    def ignored(folder: str, names: list[str]) -> list[str]:
        paths = {name: str((Path(folder) / name).relative_to(ROOT)) for name in names}
        return [n for n, path in paths.items() if any(fnmatch(path, p) or fnmatch(f"/{path}", p) for p in patterns)]

    shutil.copytree(ROOT, sources, ignore=ignored)
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment = {**clean, "PATH": f"{place / 'bin'}:{os.environ['PATH']}"}
    for step in first_stage((ROOT / "Dockerfile").read_text())[1:]:
        here = (
            step.replace("/opt/spo_fast", str(place)).replace("[cuda,", "[").replace("python3 ", f"{sys.executable} ")
        )
        if shutil.which("nvcc") is None:
            here = here.replace("SPO_FAST_BUILD_CUDA=1 ", "")
        subprocess.run(here, shell=True, check=True, cwd=sources, env=environment)
    shutil.rmtree(sources)

    def run(*words: str) -> str:
        found = subprocess.run(words, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
        return found.stdout

    assert run("spo-fast", "--help") == USAGE
    libraries = run("python", "-c", "import spo_fast, os; print(os.listdir(spo_fast.__path__[0] + '/lib'))")
    assert "libspo_fast_cpu.so" in libraries
    assert ("libspo_fast_cuda.so" in libraries) == (shutil.which("nvcc") is not None)
    small = ("--max_train_steps", "1", "--num_validation_images", "0", "--sample_batch_size", "2", "--num_steps", "10")
    assert "pytorch_lora_weights.safetensors" in run("spo-fast", "train", "--model", "toy", *small)
