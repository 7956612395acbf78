"""models/compile.py: no graph break, no recompilation after the first iteration, and the same numbers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from runs import SMALL, built, command_line, facts
from torch import nn
from torch._dynamo.utils import counters

from spo_fast import train
from spo_fast.config.methods import METHODS, readers
from spo_fast.config.sections import ModelConfig
from spo_fast.evaluation.required_files import resolve
from spo_fast.method.experience import Experience
from spo_fast.method.objectives import SPO
from spo_fast.method.rollout import Segments
from spo_fast.models.compile import compile_network, keep_cache
from spo_fast.models.files.load import load_text_encoders, load_unet
from spo_fast.scorers.latent_files import init_latent_reward, save_latent_reward
from spo_fast.scorers.spm import make_tiny_spm
from spo_fast.toy.build import write_pairs
from spo_fast.training import batches, loop

TOY: dict[str, Any] = {
    "num_steps": 4,
    "branch_start": 2,
    "sample_batch_size": 4,
    "max_prompts": 16,
    "train_batch_size": 4,
    "resolution": 16,
    "states_per_forward": 5,
    "decode_chunk": 6,
    "threshold": -1,
    "fuse": True,
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


def iteration(run: loop.Run, number: int, share: float) -> dict[str, Any]:
    """Of its rollout only this share of the pairs is kept."""

    class Fewer(SPO):
        def collect(self, *args: Any) -> Experience:
            experience = super().collect(*args)
            return experience.select(slice(0, round(share * len(experience))))

    run.objective = run.learner.objective = Fewer()
    return run.iterate(number, lambda name: contextlib.nullcontext())  # type: ignore[arg-type, return-value]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["regional", "full"])
def test_nothing_is_recompiled(how, tmp_path, monkeypatch):
    whole = loop.Run.compile
    monkeypatch.setattr(loop.Run, "compile", lambda run: whole(run, backend="aot_eager"))
    run = built(tmp_path / "run", **TOY, compile=how)
    batches.encode_first(run)
    plain = built(tmp_path / "plain", **TOY)
    batches.encode_first(plain)
    seen = []
    for number, share in enumerate((1.0, 0.55, 0.3, 0.0)):
        torch.compiler.set_stance("fail_on_recompile" if number else "default")
        got, want = iteration(run, number, share), iteration(plain, number, share)
        seen.append(got["pairs"])
        assert got["pairs"] == want["pairs"]
        if got["pairs"]:
            assert float(got["loss"]) == pytest.approx(float(want["loss"]), rel=1e-5)
            assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-3)
    assert len(set(seen)) == 4 and not counters["graph_break"] and counters["stats"]["unique_graphs"] >= 5
    # what the padding is for
    run.policy.state_sizes = ()
    with pytest.raises(RuntimeError, match="recompile"):
        iteration(run, 4, 0.9)


# ---------------------------------------------------------------------------------- what a counting backend is given

READS = readers()
KEPT = (1.0, 0.6, 0.35, 0.8, 0.15)  # of the pairs, by iteration
TOKENS = 514  # of the tiny pipelines' tokenizer


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Five iterations of a method on the toy or a tiny pipeline, epochs' last batches short, and validations."""
    folder = tmp_path_factory.mktemp("files")

    def of(kind: str, method: str, **more: Any) -> list[str]:
        found: dict[str, Any] = {name: None for name in SMALL if method not in READS.get(name, (method,))}
        found |= {"method": method, "model": kind, "fuse": True, "compile": "regional", "max_train_steps": 5}
        found |= {"decode_chunk": 4, "num_validation_images": 3, "validation_steps": 2, "device": "cpu"}
        home = folder / kind
        if kind != "toy":
            if not home.exists():
                getattr(tiny, f"make_tiny_{kind}")(home)
            found |= {"resolution": 64, "pretrained_model_name_or_path": home}
            found |= {"pretrained_vae_model_name_or_path": home / "vae"} if kind == "sdxl" else {}
        if METHODS[method].on_pairs:
            pytest.importorskip("pyarrow")
            write_pairs(folder / "pairs.parquet", 40, seed=0)
            found |= {"pairs": folder / "pairs.parquet", "validation_share": 0.3, "num_train_epochs": 9}
            return command_line({**SMALL, **found, "sample_batch_size": 4, **more})
        found |= {"max_prompts": 11, "sample_batch_size": 3, "train_batch_size": 3}
        found |= {"branch_start": 2} | ({"num_inner_steps": 1} if method == "mspo" else {})
        if method == "lpo":
            source = ModelConfig(model=kind, pretrained_model_name_or_path=None if kind == "toy" else str(home))  # type: ignore[arg-type]
            files = resolve(source, {})
            parts = load_unet(files, torch.float32), load_text_encoders(files, torch.float32)
            save_latent_reward(init_latent_reward(*parts, seed=0), folder / f"{kind}-lrm")
            found["lrm_path"] = folder / f"{kind}-lrm"
        elif kind != "toy":
            found |= {"scorer": "spm", "spm_path": make_tiny_spm(folder / f"{kind}-spm", vocab_size=TOKENS)}
        return command_line({**SMALL, **found, **more})

    return of


QUICK = [("toy", "spo", {})]
SLOW = [(kind, m, {}) for kind in ("toy", "sd15", "sdxl") for m in METHODS if (kind, m, {}) not in QUICK] + [
    ("toy", "spo", {"compile": "full"}), ("toy", "spo", {"full_finetune": True}),
    ("toy", "mspo", {"rollout_weights": "merged"}), ("toy", "spo", {"branch_start": 0, "guidance_scale": 1.0}),
    ("toy", "spo", {"states_per_forward": 4, "decode_chunk": 5}), ("toy", "spo", {"rows_per_forward": 6}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "method", "more"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_no_new_graph_after_the_first_iteration(kind, method, more, settings, tmp_path, monkeypatch):
    """Whatever number of pairs is kept, in an epoch's short last batch, and in validations."""
    graphs: list[int] = []  # after each iteration
    given = []

    def backend(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        given.append(tuple(tuple(x.shape) for x in inputs if type(x) is torch.Tensor))
        return module.forward

    whole, compact = loop.Run.compile, Segments.compact

    def fewer(segments: Segments, cond: Any) -> Experience:
        valid = torch.ones_like(segments.valid)
        valid.view(-1)[round(KEPT[len(graphs)] * valid.numel()) :] = False
        return compact(replace(segments, valid=valid), cond)

    monkeypatch.setattr(loop.Run, "compile", lambda run: whole(run, backend=backend))
    monkeypatch.setattr(Segments, "compact", fewer)
    run = loop.Run(train.parse([*settings(kind, method, **more), "--output_dir", str(tmp_path)]))
    run.after_iteration = lambda _: graphs.append(len(given))
    run.train()
    pairs = [record["pairs"] for record in facts(tmp_path)]
    assert len(pairs) == 5 and (METHODS[method].on_pairs or len(set(pairs)) > 1) and min(pairs) > 0
    assert method not in ("spo", "mspo", "d3po", "lpo", "gradspo") or len(set(pairs)) == 5
    assert len(graphs) == 5 and graphs[0] >= 10
    assert given[graphs[0] :] == []


def test_batches_are_filled_up_and_cut_again():
    seen: list[int] = []

    class Doubled(nn.Module):
        def forward(self, x, add=1.0):
            seen.append(len(x))
            return 2 * x + add

    network = Doubled()
    compile_network(network, "regional", blocks=(), sizes=(2, 5))
    for count in (1, 2, 3, 5, 6):
        x = torch.arange(3.0 * count).view(count, 3)
        assert torch.equal(network(x, 0.5), 2 * x + 0.5)
    assert seen == [2, 2, 5, 5, 6]


def test_the_cache_is_the_users(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert keep_cache(tmp_path / "run") == tmp_path / "home" / "spo_fast" / "compile"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "home" / "spo_fast" / "compile")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    assert keep_cache(tmp_path / "run") == tmp_path / "mine"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # no directory can be made there
    assert keep_cache(tmp_path / "run") == tmp_path / "run" / "compile_cache"
