"""All methods from the command line, on the toy: resuming, export, what each rollout costs, ablations."""

from __future__ import annotations

import dataclasses
import gc
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import recorded as tape
import torch
from runs import SMALL, assert_same_end, assert_same_tensors, built, command_line, facts, killed_run, run_toy
from safetensors.torch import load_file
from test_rollout import Net, Scorer, SeededDraws, decode, judge, scheduled

from spo_fast import train
from spo_fast.config.methods import METHODS, readers
from spo_fast.config.presets import PRESETS
from spo_fast.config.sections import FLOWS, ModelConfig
from spo_fast.config.training import ObjectiveConfig, SampleConfig
from spo_fast.evaluation.required_files import resolve
from spo_fast.method import rollout
from spo_fast.method.noise import KeyedDraws
from spo_fast.method.objectives import make_objective
from spo_fast.method.rollout import Sampler, branching_rollout, rollout_segments, trajectory_rollout
from spo_fast.models.files.load import load_text_encoders, load_unet
from spo_fast.models.files.toy import FLOW_WEIGHTS, WEIGHTS, WITHOUT_T5
from spo_fast.ops import transition
from spo_fast.scorers.latent_files import init_latent_reward, save_latent_reward
from spo_fast.toy.build import write_pairs
from spo_fast.training import batches
from spo_fast.training.monitor.timer import Timer

READS = readers()
DATA = [m for m, record in METHODS.items() if record.on_pairs]
ONLINE = [m for m in METHODS if m not in DATA]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pairs, and a latent reward model of random projection: its scores mean nothing, but depend on what it sees."""
    pytest.importorskip("pyarrow")
    folder = tmp_path_factory.mktemp("files")
    write_pairs(folder / "pairs.parquet", 40, seed=0)
    resolved = resolve(ModelConfig(model="toy"), {})
    parts = load_unet(resolved, torch.float32), load_text_encoders(resolved, torch.float32)
    save_latent_reward(init_latent_reward(*parts, seed=0), folder / "lrm")
    return {"pairs": folder / "pairs.parquet", "lrm_path": folder / "lrm"}


@pytest.fixture
def of(files: dict[str, Path]) -> Callable[..., dict[str, Any]]:
    """A method's settings for a run of seconds: tests/runs.py's without those that it does not read."""

    def settings(method: str, **more: Any) -> dict[str, Any]:
        found = {name: None for name in SMALL if method not in READS.get(name, (method,))}
        found |= {"method": method, "branch_start": None if method in DATA else 2, "max_train_steps": 2}
        if method in DATA:
            found |= {"pairs": files["pairs"], "validation_share": 0.3, "sample_batch_size": 4, "num_train_epochs": 9}
        if method == "lpo":
            found |= {"lrm_path": files["lrm_path"]}
        if method == "mspo":
            found |= {"num_inner_steps": 1}
        if method in ("nft", "awm"):
            found |= {"guidance_scale": 1.0}
        return {**found, **more}

    return settings


# ------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("method", ["lpo", *sorted(DATA)])
def test_replays_of_what_is_captured_equal_plain_calls(
    tmp_path: Path, of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """The methods that need files; all others: test_graphs.py."""
    monkeypatch.setattr("spo_fast.training.accelerate.state_sizes", lambda cfg, parts: ())
    settings = of(method, max_train_steps=4, num_train_epochs=9)
    plain = run_toy(tmp_path / "plain", **settings)
    graphs = tape.recording(monkeypatch)
    replayed = run_toy(tmp_path / "replayed", **settings)
    assert facts(replayed) == facts(plain) and len(graphs[0]) >= 3
    assert_same_tensors(*(run / "pytorch_lora_weights.safetensors" for run in (plain, replayed)))


ON_FLOWS = [m for m in METHODS if m not in ("lpo", "mapo")]  # which are refused there


@pytest.mark.parametrize(("model", "method"), [("toy", m) for m in METHODS] + [("toy-flow", m) for m in ON_FLOWS])
def test_two_steps_resumed_bit_identically_and_read_by_diffusers(
    tmp_path: Path, of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, model: str, method: str, pipelines: Any
) -> None:
    settings = of(method, model=model, checkpointing_steps=1, max_train_steps=3 if method == "gradspo" else 2)
    if model == "toy-flow":  # the last two of four steps are not trained
        settings["branch_start"] = None if method in DATA else 0
    whole = run_toy(tmp_path / "whole", **settings)
    killed = killed_run(tmp_path / "killed", monkeypatch, 1, **settings)
    run_toy(killed, resume_from_checkpoint="latest", **settings)
    assert_same_end(whole, killed)
    records = facts(whole)
    assert all(r["pairs"] > 0 and r["optimizer_steps"] > 0 and "loss" in r for r in records)
    if method in DATA:
        assert all(0 <= r["validation_accuracy"] <= 1 for r in records)
    trained = load_file(whole / "checkpoint-2" / "trained.safetensors")
    assert any((v != 0).any() for name, v in trained.items() if "lora_B" in name)
    pipeline = pipelines[model]
    pipeline.load_lora_weights(whole)
    network = pipeline.unet if model == "toy" else pipeline.transformer
    loaded = {n: p for n, p in network.named_parameters() if "lora" in n}
    assert loaded.keys() == {n.replace(".default.", ".default_0.") for n in trained}
    last = load_file(sorted(whole.glob("checkpoint-*"))[-1] / "trained.safetensors")
    assert all(torch.equal(loaded[n.replace(".default.", ".default_0.")], v) for n, v in last.items())
    pipeline.unload_lora_weights()


@pytest.fixture(scope="module")
def pipelines() -> dict[str, Any]:
    from diffusers import StableDiffusion3Pipeline, StableDiffusionXLPipeline

    flow = StableDiffusion3Pipeline.from_pretrained(str(FLOW_WEIGHTS), **WITHOUT_T5)
    return {"toy": StableDiffusionXLPipeline.from_pretrained(str(WEIGHTS)), "toy-flow": flow}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_longer_runs_stay_finite(tmp_path: Path, of: Callable[..., Any], method: str) -> None:
    out = run_toy(tmp_path / "run", **of(method, max_train_steps=12, num_train_epochs=12, num_validation_images=1))
    records = facts(out)
    assert len(records) == 12 and all(r["nonfinite_steps"] == 0 and "nonfinite" not in r for r in records)
    assert (out / "report.html").is_file() and method.upper() in (out / "README.md").read_text()


def test_gradspo_keeps_averages_and_spo_none(tmp_path: Path, of: Callable[..., Any]) -> None:
    out = run_toy(tmp_path / "run", **of("gradspo"))
    assert (out / "checkpoint-2" / "averages.safetensors").is_file()
    assert not (run_toy(tmp_path / "spo", **of("spo")) / "checkpoint-2" / "averages.safetensors").exists()


def test_a_checkpoint_of_another_method_is_refused(
    tmp_path: Path, of: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    out = run_toy(tmp_path / "run", **of("spo", max_train_steps=1))
    line = command_line({**SMALL, **of("gradspo"), "output_dir": out, "resume_from_checkpoint": "latest"})
    assert train.main(line) == 1
    assert "method: spo -> gradspo" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- what they learn from


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("method", ["ddpo", "dpok"])
def test_the_ratio_is_exactly_one_before_the_first_update(
    tmp_path: Path, of: Callable[..., Any], method: str, precision: str
) -> None:
    """In micro-batches of odd sizes, with a policy that is not the reference: old and new are one to the last bit."""
    settings = of(method, train_batch_size=64, states_per_forward=3, mixed_precision=precision, kl_weight=None)
    run = built(tmp_path / "run", **settings)
    batches.encode_first(run)
    generator = torch.Generator().manual_seed(0)
    weights = run.policy.state_dict()
    run.policy.load_state_dict({n: 0.2 * torch.randn(v.shape, generator=generator) for n, v in weights.items()})
    record = run.iterate(0, Timer())
    assert record["optimizer_steps"] == 1 and record["states"] == record["pairs"] == 2 * 2 * 2
    assert float(record["ratio"]) == 1 and float(record["approx_kl"]) == 0 and float(record["clamped"]) == 0
    assert (float(record["kl"]) > 1e-3) == (method == "dpok")
    assert float(run.iterate(0, Timer())["ratio"]) == 1  # of the next rollout too: old is the policy, not the reference


def test_advantages_are_of_each_prompt() -> None:
    cfg = SampleConfig(num_candidates=4, num_steps=4, branch_start=1)
    _, table, batch = scheduled(cfg)
    batch = dataclasses.replace(batch, draws=Starts(3, batch.latent_shape, 0))
    walk = trajectory_rollout(Sampler(Net(), table, Scorer(), decode, cfg), batch)
    e = make_objective(ObjectiveConfig(method="ddpo")).collect(Sampler(Net(), table, Scorer(), decode, cfg, 8), batch)
    assert walk.scores.shape == (4, 3) and len(e) == 3 * 4 * 3
    for n in range(len(e)):
        state = e.states.select(e.index[n, 0])
        b, row = int(state.prompts), int(state.rows)
        k = next(k for k in range(4) if torch.equal(walk.x[row, k, b], state.x_t[0]))
        assert torch.equal(e.x_prev[n, 0, 0], walk.x[row + 1, k, b])
        scores = walk.scores[:, b].tolist()
        mean = sum(scores) / 4
        deviation = (sum((s - mean) ** 2 for s in scores) / 4) ** 0.5
        assert float(e.advantage[n]) == pytest.approx((scores[k] - mean) / (deviation + 1e-6), rel=1e-5)


class Starts(SeededDraws):
    """Draws whose trajectories have starts of their own."""

    def latents(self, shape: Any, dtype: Any, num_starts: int = 1) -> torch.Tensor:
        return torch.randn(num_starts * self.B, *shape, generator=self._generator(9), dtype=dtype)


def test_trajectories_are_diffusers_ddim() -> None:
    cfg = SampleConfig(num_candidates=3, num_steps=5, branch_start=0)
    scheduler, table, batch = scheduled(cfg)
    batch = dataclasses.replace(batch, draws=Starts(3, batch.latent_shape, 0))
    walk = trajectory_rollout(Sampler(Net(), table, Scorer(), decode, cfg), batch)
    x = batch.draws.latents(batch.latent_shape, torch.float64, 3).view(3, 3, *batch.latent_shape)
    for i, t in enumerate(scheduler.timesteps):
        noise = batch.draws.children(i, 1, 3)["noise"].view_as(x)
        for k in range(3):
            m = Net().predict(x[k], t, batch.cond, True)
            m = m.uncond + cfg.guidance_scale * (m.cond - m.uncond)
            x[k] = scheduler.step(m, t, x[k], eta=1.0, variance_noise=noise[k]).prev_sample
        torch.testing.assert_close(walk.x[i + 1], x, rtol=1e-9, atol=1e-9)
    want = judge(decode(x.flatten(0, 1)), torch.tensor(0), batch.text.repeat(3)).view(3, 3)
    torch.testing.assert_close(walk.scores, want)


@pytest.mark.parametrize("method", ["d3po", "ddpo", "dpok", "dense"])
def test_whole_trajectories_are_made_of_the_branching_rollouts_steps(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is one sampler: each step of any rollout is Rollout's, and children have no other maker."""
    cfg = SampleConfig(num_candidates=3, num_steps=6, branch_start=0, threshold=-1.0)
    _, table, batch = scheduled(cfg)
    batch = dataclasses.replace(batch, draws=KeyedDraws(1, 0, torch.arange(3)), dtype=torch.float32)
    steps: list[int] = []
    branch, advance, made = rollout.Rollout.branch, rollout.Rollout.advance, transition.transition
    monkeypatch.setattr(rollout.Rollout, "branch", lambda walk, m, x, i: steps.append(i) or branch(walk, m, x, i))  # type: ignore[func-returns-value]
    monkeypatch.setattr(rollout.Rollout, "advance", lambda walk, x, i: steps.append(i) or advance(walk, x, i))  # type: ignore[func-returns-value]
    children: list[int] = []
    monkeypatch.setattr(rollout, "transition", lambda *a, **k: children.append(k["num_children"]) or made(*a, **k))
    net = Net()
    objective = make_objective(PRESETS["toy"]().with_fields(method=method).objective)
    e = objective.collect(Sampler(net, table, Scorer(), decode, cfg, 8), batch)
    assert steps == list(range(6)) and net.calls == 6 and sum(c > 0 for c in children) == 6
    assert len(e) > 0


def test_d3po_compares_ends_and_labels_every_step() -> None:
    cfg = SampleConfig(num_candidates=2, num_steps=5, branch_start=0, threshold=0.0)
    _, table, batch = scheduled(cfg)
    e = make_objective(ObjectiveConfig(method="d3po")).collect(Sampler(Net(), table, Scorer(), decode, cfg, 8), batch)
    assert len(e) == 3 * 5 and len(e.scores) == 2 * 3
    ends = [(e.x_prev[n], int(e.states.select(e.index[n, :, 0]).prompts[0])) for n in range(12, 15)]
    for x, b in ends:  # the last step's children: the winner's end scores higher
        scores = judge(decode(x[:, 0]), torch.tensor(0), batch.text[b])
        assert scores[0] > scores[1]
    assert [int((e.index[n, 0] == e.index[n, 1]).all()) for n in range(15)] == [1] * 3 + [0] * 12  # one x_T


def test_dense_ranks_and_draws_early_steps_more_often() -> None:
    cfg = SampleConfig(num_candidates=4, num_steps=10, branch_start=2)
    _, table, batch = scheduled(cfg)
    draws = KeyedDraws(1, 0, torch.arange(3))
    batch = dataclasses.replace(batch, draws=draws, dtype=torch.float32, text=batch.text.float())
    settings = ObjectiveConfig(method="dense", terms_per_prompt=400, num_sampled_steps=3, num_ranked=3, gamma=0.5)
    objective = make_objective(settings)
    walk = trajectory_rollout(Sampler(Net(), table, Scorer(), decode, cfg), batch)
    e = objective.collect(Sampler(Net(), table, Scorer(), decode, cfg, 8), batch)
    assert e.index.shape == (1200, 3, 3)
    rows, prompts = e.states.rows[e.index], e.states.prompts[e.index]
    assert (rows == rows[:, :1]).all() and (prompts == prompts[:, :1, :1]).all()  # the same steps and prompt
    share = torch.bincount(rows[:, 0].flatten(), minlength=10).double() / rows[:, 0].numel()
    weights = torch.tensor([0.0, 0, *(0.5**i for i in range(8))], dtype=torch.float64)
    torch.testing.assert_close(share, weights / weights.sum(), rtol=0, atol=0.03)
    seen = set()
    for n in range(0, 1200, 7):
        b = int(prompts[n, 0, 0])
        x_t = e.states.x_t[e.index[n, :, 0]]
        chosen = [next(k for k in range(4) if torch.equal(walk.x[rows[n, 0, 0], k, b], x)) for x in x_t]
        scores = walk.scores[chosen, b]
        assert len(set(chosen)) == 3 and (scores.diff() <= 0).all()  # three of the four, best first
        for s in range(3):
            row = int(rows[n, 0, s])
            assert torch.equal(e.x_prev[n, :, s], walk.x[row + 1, chosen, b])
        seen.add(tuple(sorted(chosen)))
    assert len(seen) == 4  # every subset comes up


@pytest.mark.parametrize("method", DATA)
def test_pairs_are_read_preferred_image_first(tmp_path: Path, of: Callable[..., Any], method: str) -> None:
    """Against the parquet itself: ties left out, prompts dropped at the share asked for, latents of the right image."""
    import io

    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    settings = of(method, prompt_dropout=0.4, sample_batch_size=20, cache_latents=True, validation_share=0.05)
    table = pq.read_table(settings["pairs"])
    labels = [[0.5 if n < 3 else label for n, label in enumerate(table[f"label_{j}"].to_pylist())] for j in range(2)]
    for j in range(2):
        column = table.schema.get_field_index(f"label_{j}")
        table = table.set_column(
            column, table.schema.field(column), pa.array(labels[j], table.schema.field(column).type)
        )
    pq.write_table(table, tmp_path / "pairs.parquet")
    run = built(tmp_path / "run", **{**settings, "pairs": tmp_path / "pairs.parquet"}, resolution=16)
    table = table.to_pylist()
    ties = sum(row["label_0"] == 0.5 for row in table)
    assert ties == 3 and len(run.pairs.train_rows) + len(run.pairs.valid_rows) == len(table) - ties
    prompts = []
    whole = run.model.cond
    run.model.cond = lambda p: prompts.extend(p) or whole(p)  # type: ignore[method-assign, func-returns-value]
    preferred = {}
    for row in table:
        if row["label_0"] == 0.5:
            continue
        best = int(row["label_0"] < row["label_1"])
        pictures = [np.asarray(Image.open(io.BytesIO(row[f"jpg_{j}"])), np.float32) for j in (best, 1 - best)]
        pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 127.5 - 1
        preferred.setdefault(row["caption"], []).append(pixels)
    position, dropped, seen = 0, 0, 0
    for iteration in range(4):
        e, position = run.pairs.batch(iteration, position)
        assert e.latents.shape == (2, 20, *run.model.latent_shape)
        mine, prompts[:] = list(prompts), []
        for b, prompt in enumerate(mine):
            pixels = run.model.decode(e.latents[:, b]).clamp(-1, 1)
            candidates = preferred[prompt] if prompt else [x for rows in preferred.values() for x in rows]
            # the toy's VAE is exact to 1e-4
            assert min(float((pixels - x).abs().max()) for x in candidates) < 1e-2
            dropped, seen = dropped + (prompt == ""), seen + 1
    run.pairs.close()
    assert 0.2 < dropped / seen < 0.6  # 80 drawn at 0.4: the deviation is 0.055
    first = sorted((tmp_path / "run" / "latent_cache").rglob("*.safetensors"))
    assert first  # kept, since the run reads them again


# ------------------------------------------------------------------------------------------------- LPO


def test_lpo_needs_no_vae_and_one_unet_row_a_step(tmp_path: Path, of: Callable[..., Any]) -> None:
    run = built(tmp_path / "run", **of("lpo", num_candidates=3, threshold=-1))
    batches.encode_first(run)
    rows, seen = [], []
    run.model.network.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    run.model.vae.decoder.register_forward_pre_hook(lambda *_: pytest.fail("LPO decodes nothing"))
    score = run.scorer.model.score
    run.scorer.model.score = lambda x, t, *a: seen.append((len(x), t.tolist())) or score(x, t, *a)
    inputs = batches.inputs(run, 0).batch
    e = run.objective.collect(dataclasses.replace(run.sampler, decode=run.model.decode, decode_chunk=64), inputs)
    # 2 prompts and both guidance halves at each of 4 steps; 3 children of each prompt scored at their parent's timestep
    assert rows == [4] * 4
    assert seen == [(6, [int(run.table.timesteps[i])] * 6) for i in (2, 3)]
    assert len(e) == 4 and len(e.states) == 4


class SeesChildren:
    """Scores children by a formula, and remembers what it was shown."""

    judges = "children"

    def __init__(self) -> None:
        self.shown: list[Any] = []

    def __call__(self, candidates: Any) -> torch.Tensor:
        self.shown.append(candidates)
        return 30 * candidates.x_t[:, 0, 0, 0] * (1 + candidates.t / 1000)


@pytest.mark.parametrize("low, high", [(0.3, 0.9), (0.9, 0.3), (0.5, 0.5)])
def test_lpo_picks_children_by_a_threshold_linear_in_sigma(low: float, high: float) -> None:
    cfg = SampleConfig(num_candidates=3, num_steps=20, branch_start=0, threshold=low, threshold_max=high)
    _, table, batch = scheduled(cfg, B=4)
    scorer, net = SeesChildren(), Net()
    e = branching_rollout(Sampler(net, table, scorer, None, cfg), batch)
    assert net.calls == 20 and net.rows == 2 * 4 * 20 and len(scorer.shown) == 20
    # the published table of sigmas (compare_funcs.py), rounded there to four places; t = 1 first
    sigma = [0.0206, 0.0406, 0.1673, 0.2144, 0.2509, 0.2836, 0.3144, 0.3442, 0.3732, 0.4016]
    sigma += [0.4293, 0.4565, 0.4829, 0.5087, 0.5336, 0.5576, 0.5807, 0.6029, 0.6241, 0.6444]
    want, doubtful = set(), set()
    for candidates in scorer.shown:
        i = (951 - int(candidates.t)) // 50
        threshold = low + (high - low) * (sigma[19 - i] - sigma[0]) / (sigma[19] - sigma[0])
        scores = (30 * candidates.x_t[:, 0, 0, 0] * (1 + candidates.t / 1000)).view(3, 4)
        for b in range(4):
            p = torch.stack([scores[:, b].max(), scores[:, b].min()]).softmax(0)
            (doubtful if abs(float(p[0] - p[1]) - threshold) < 1e-3 else want).add(
                (i, b, bool(p[0] - p[1] > threshold))
            )
    kept = {(int(e.states.rows[u]), int(e.states.prompts[u])) for u in e.index[:, 0, 0].tolist()}
    for i, b, keep in want:
        assert ((i, b) in kept) == keep
    assert {keep for *_, keep in want} == {True, False} and len(doubtful) < 5


def test_lpo_with_a_scorer_of_images_is_refused(
    tmp_path: Path, of: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for scorer, words in ((["spm"], "Use --scorer lrm"), (["lrm", "spm:0.1"], "cannot mix lrm")):
        line = command_line({**SMALL, **of("lpo"), "output_dir": tmp_path / "run", "scorer": scorer})
        assert train.main(line) == 1
        assert words in capsys.readouterr().err


def test_without_a_latent_reward_model_its_flag_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], of: Callable[..., Any]
) -> None:
    assert train.main(command_line({**SMALL, **of("lpo", lrm_path=None), "output_dir": tmp_path / "run"})) == 1
    error = capsys.readouterr().err
    assert "--lrm_path" in error and "train_spm --parameterisation latent" in error


# ------------------------------------------------------------------------------------------------- GradSPO


def test_gradspos_average_collects_and_follows_each_step(tmp_path: Path, of: Callable[..., Any]) -> None:
    run = built(tmp_path / "run", **of("gradspo", ema_decay=0.8, train_batch_size=1, learning_rate=1e-2))
    batches.encode_first(run)
    want = {name: v.clone() for name, v in run.policy.state_dict().items()}
    step, steps = run.learner.step, []

    def counted() -> float:
        norm = step()
        for name, v in run.policy.state_dict().items():
            want[name] = 0.8 * want[name] + 0.2 * v
        steps.append(norm)
        return norm

    run.learner.step = counted  # type: ignore[method-assign]
    run.iterate(0, Timer())
    assert len(steps) == 4
    for name, v in run.policy.average_state_dict().items():
        torch.testing.assert_close(v, want[name], rtol=1e-6, atol=1e-8)
    predict, during = run.policy.predict, []
    run.policy.predict = lambda *a, **k: during.append([p.clone() for p in run.policy._weights]) or predict(*a, **k)  # type: ignore[method-assign, func-returns-value]
    inputs = batches.inputs(run, 1).batch
    sampler = dataclasses.replace(run.sampler, decode=run.model.decode, decode_chunk=8)
    before = [p.clone() for p in run.policy._weights]
    run.objective.collect(sampler, inputs)
    assert len(during) == run.cfg.sample.num_steps
    for now in during:
        assert all(torch.equal(p, average) for p, average in zip(now, run.policy.averages, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(before, run.policy._weights, strict=True))
    assert any(not torch.equal(p, q) for p, q in zip(before, run.policy.averages, strict=True))


def test_gradspos_last_pair_is_judged_at_the_last_timestep_and_kept() -> None:
    cfg = SampleConfig(num_candidates=2, num_steps=6, branch_start=2, threshold=0.999999, last_step="keep")
    _, table, batch = scheduled(cfg)
    times: list[int] = []
    scorer = Scorer()
    judge = lambda c: times.append(int(c.t)) or scorer(c)  # type: ignore[func-returns-value]  # noqa: E731
    e = branching_rollout(Sampler(Net(), table, judge, decode, cfg), batch)
    assert times == [int(table.timesteps[i]) for i in (3, 4, 5, 5)]
    assert e.states.rows.tolist() == [5] * 3


# ------------------------------------------------------------------------------------------------- ablations


def recorded(base: SampleConfig, cfg: SampleConfig) -> tuple[Any, Any]:
    """Two rollouts on the same draws."""
    out = []
    for c in (base, cfg):
        _, table, batch = scheduled(c)
        out.append(rollout_segments(Sampler(Net(), table, Scorer(), decode, c), batch))
    return out[0], out[1]


BASE = SampleConfig(num_candidates=3, num_steps=8, branch_start=2, threshold=0.2)


def test_threshold_changes_only_which_pairs_are_kept() -> None:
    a, b = recorded(BASE, dataclasses.replace(BASE, threshold=0.9))
    assert torch.equal(a.x_t, b.x_t) and torch.equal(a.x_prev, b.x_prev) and torch.equal(a.scores, b.scores)
    assert (b.valid & ~a.valid).sum() == 0 and (a.valid & ~b.valid).sum() > 0


@pytest.mark.parametrize("start", ["winner", "loser"])
def test_next_start_changes_where_the_next_step_begins(start: str) -> None:
    a, b = recorded(BASE, dataclasses.replace(BASE, next_start=start))
    assert torch.equal(a.x_prev[0], b.x_prev[0]) and torch.equal(a.scores[:9], b.scores[:9])
    side = 0 if start == "winner" else 1
    for g in range(len(b.rows) - 1):
        assert torch.equal(b.x_t[g + 1, 0], b.x_prev[g, side])
    assert not torch.equal(a.x_t, b.x_t)


def test_branch_end_leaves_out_the_last_steps() -> None:
    a, b = recorded(BASE, dataclasses.replace(BASE, branch_end=5))
    assert a.rows == [2, 3, 4, 5, 6, 7] and b.rows == [2, 3, 4]
    assert torch.equal(a.x_t[:3], b.x_t) and torch.equal(a.x_prev[:3], b.x_prev) and torch.equal(a.valid[:3], b.valid)


def test_branch_start_leaves_out_the_first_steps() -> None:
    a, b = recorded(BASE, dataclasses.replace(BASE, branch_start=4))
    assert b.rows == a.rows[2:]


def test_num_candidates_and_inner_steps() -> None:
    a, b = recorded(BASE, dataclasses.replace(BASE, num_candidates=5))
    assert len(b.scores) * 3 == len(a.scores) * 5 and a.rows == b.rows
    a, b = recorded(BASE, dataclasses.replace(BASE, num_inner_steps=2))
    assert len(b.scores) * 3 == len(a.scores) and a.rows == b.rows and sum(b.shared) * 3 == sum(a.shared)


@pytest.mark.parametrize("changed", [{"beta": 3.0}, {"clip": 0.3}, {"clip": "none"}])
def test_beta_and_clip_change_the_loss_only(tmp_path: Path, of: Callable[..., Any], changed: dict[str, Any]) -> None:
    # beta changes nothing where every ratio is outside the clip, as after one such step on some CPUs
    settings = {"learning_rate": 0.03, "max_train_steps": 1, "train_batch_size": 2}
    settings["clip"] = "none" if "beta" in changed else 1e-4
    a, b = (facts(run_toy(tmp_path / f"{i}", **of("spo", **{**settings, **c})))[0] for i, c in enumerate(({}, changed)))
    assert a["score_mean"] == b["score_mean"] and a["pairs"] == b["pairs"]
    assert a["loss"] != b["loss"]


def test_scorers_change_the_judgement_and_not_the_first_candidates(tmp_path: Path, of: Callable[..., Any]) -> None:
    """PickScore in the SPM's place, a weighted sum, and a model that does not know the timestep."""
    scorers: dict[str, dict[str, Any]] = {
        "spm": {},
        "pickscore": {"scorer": "pickscore"},
        "sum": {"scorer": ["spm:1", "pickscore:0.5"]},
        "unconditioned": {"spm_path": WEIGHTS / "pickscore", "spm_time_conditioned": False},
    }
    kept = {}
    for name, settings in scorers.items():
        run = built(tmp_path / name, **of("spo", **settings))
        batches.encode_first(run)
        inputs = batches.inputs(run, 0).batch
        sampler = dataclasses.replace(run.sampler, decode=run.model.decode, decode_chunk=64)
        kept[name] = rollout_segments(sampler, inputs)
    first = {name: s.scores[:4] for name, s in kept.items()}
    torch.testing.assert_close(first["sum"], first["spm"] + 0.5 * first["pickscore"])
    assert torch.equal(first["unconditioned"], first["pickscore"])  # the same plain CLIP by either name
    assert not torch.equal(first["spm"], first["pickscore"])
    x_t = [s.x_t[0] for s in kept.values()]
    assert all(torch.equal(x_t[0], x) for x in x_t)


# ------------------------------------------------------------------------------------------------- settings


def test_a_flag_that_a_method_does_not_read_is_an_error_with_those_that_do(capsys: pytest.CaptureFixture[str]) -> None:
    for line, words in (
        ("--method ddpo --threshold 0.3", "--threshold is not read by --method ddpo, only by spo, mspo"),
        ("--method spo --pairs x", "--pairs is not read by --method spo, only by dpo, mapo."),
        ("--kl_weight 1", "--kl_weight is not read by --method spo, only by dpok, stepgrpo"),
        ("--method dpo --pairs x --normalise_scorers", "--normalise_scorers is not read by --method dpo, only by spo"),
        ("--method dpo", "--method dpo trains on --pairs"),
    ):
        assert train.main(["--model", "toy", *line.split()]) == 2
        assert words in capsys.readouterr().err


def test_a_saved_config_repeats_any_method(tmp_path: Path, of: Callable[..., Any]) -> None:
    for method in ("ddpo", "dpo"):
        out = run_toy(tmp_path / method, **of(method, max_train_steps=1))
        again = train.parse(["--config", str(out / "config.yaml"), "--learning_rate", "1e-9"])
        assert again.objective.method == method and again.optim.learning_rate == 1e-9


@pytest.mark.parametrize("method", ["ddpo", "dense", "lpo", "gradspo", "stepgrpo", "nft", "dpo"])
def test_dry_run_of_other_methods(
    tmp_path: Path, of: Callable[..., Any], capsys: pytest.CaptureFixture[str], method: str
) -> None:
    """It runs their code on fake tensors, loads nothing, and says what a data set would have to tell."""
    line = command_line({**SMALL, **of(method), "output_dir": tmp_path / "run"})
    assert train.main([*line, "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert not (tmp_path / "run").exists() and "policy (" in out
    assert ("encode images (" in out) == (method == "dpo") and ("moving averages" in out) == (
        method in ("gradspo", "nft")
    )
    assert ("50% of the pairs kept" in out) == (method in ("lpo", "gradspo"))
    assert ("scorer lrm" in out) == (method == "lpo") and ("score text (" in out) == (method == "lpo")


def test_the_published_recipe_leaves_gradspos_last_step_alone() -> None:
    line = ["--model", "sdxl", "--method", "gradspo", "--recipe", "published"]
    assert train.parse(line).sample.last_step == "keep"


PUBLISHED = {  # (method, model) -> settings of the papers' code, by hand
    ("ddpo", "sd15"): {
        "num_steps": 50,
        "learning_rate": 3e-4,
        "clip": 1e-4,
        "max_grad_norm": 1.0,
        "guidance_scale": 5.0,
    },
    ("dpok", "sd15"): {"learning_rate": 1e-5, "kl_weight": 0.01, "clip": 1e-4, "max_grad_norm": 0.1},
    ("stepgrpo", "sd15"): {"clip": 1e-4, "kl_weight": 0.0, "weight_by_std": False, "num_inner_steps": 0},
    ("grpo", "sd35"): {"clip": 1e-4, "kl_weight": 0.01, "num_candidates": 24, "sampler": "flow_sde", "eta": 0.7},
    ("grpo", "flux"): {"clip": 1e-4, "kl_weight": 0.0, "num_steps": 6, "learning_rate": 3e-4, "eta": 0.9},
    ("nft", "sd35"): {"beta": 1.0, "kl_weight": 1e-4, "guidance_scale": 1.0, "num_steps": 10, "advantage_clip": 5.0},
    ("awm", "sd35"): {"awm_clip": 1.0, "ema_weight": 1.0, "advantage_std": "global", "guidance_scale": 1.0},
    ("d3po", "sd15"): {"beta": 0.1, "clip": 0.1, "learning_rate": 3e-5, "num_steps": 20, "num_candidates": 2},
    ("dense", "sd15"): {"gamma": 0.9, "beta": 12.5, "num_sampled_steps": 3, "num_ranked": 2, "num_candidates": 5},
    ("dpo", "sd15"): {"beta": 5000.0, "sample_batch_size": 2048, "max_train_steps": 2000, "learning_rate": 2.048e-5},
    ("dpo", "sdxl"): {"beta": 5000.0, "lr_warmup_steps": 200, "prompt_dropout": 0.2},
    ("mapo", "sdxl"): {"beta": 0.1, "rank": 8, "learning_rate": 1e-5, "max_train_steps": 2000, "prompt_dropout": 0.0},
    ("lpo", "sd15"): {"beta": 500.0, "threshold": 0.35, "threshold_max": 0.5, "num_candidates": 4, "branch_start": 0},
    ("lpo", "sdxl"): {"threshold": 0.45, "threshold_max": 0.6, "num_inner_steps": 0, "learning_rate": 1e-5, "rank": 64},
    ("gradspo", "sdxl"): {"num_candidates": 4, "num_inner_steps": 0, "threshold": 0.4, "ema_decay": 0.9, "beta": 10.0},
    ("spo", "sd15"): {"num_candidates": 4, "threshold": 0.3, "beta": 10.0, "clip": 0.1, "num_inner_steps": 0},
    ("mspo", "sdxl"): {"num_candidates": 2, "num_inner_steps": 3, "threshold": 0.4, "learning_rate": 1e-5},
}


@pytest.mark.parametrize("method, model", PUBLISHED)
def test_a_method_brings_its_published_settings(method: str, model: str) -> None:
    pairs = ["--pairs", "x"] if method in DATA else []
    flat = train.parse(["--model", model, "--method", method, *pairs]).flat()
    assert {name: flat[name] for name in PUBLISHED[method, model]} == PUBLISHED[method, model]
    name, value = ("beta", 7.0) if "beta" in METHODS[method].settings else ("learning_rate", 7e-4)
    given = train.parse(["--model", model, "--method", method, *pairs, f"--{name}", str(value)])
    assert given.flat()[name] == value  # flags win


@pytest.mark.parametrize("method", METHODS)
def test_a_record_says_of_transitions_what_its_class_does(method: str) -> None:
    assert METHODS[method].transitions == METHODS[method].kind().transitions


@pytest.mark.parametrize("model", PRESETS)
def test_every_method_has_settings_for_every_model(model: str) -> None:
    for method in METHODS:
        line = ["--model", model, "--method", method, *(["--pairs", "x"] if method in DATA else [])]
        if model in FLOWS and method in ("lpo", "mapo"):  # of UNets alone
            with pytest.raises(ValueError, match=f"method={method} "):
                train.parse(line)
            continue
        cfg = train.parse(line)
        assert cfg.objective.method == method
        settings = METHODS[method].defaults({"model": model})
        unread = {n for n in settings if method not in READS.get(n, (method,))}
        assert unread <= {"num_inner_steps", "branch_start"}  # what a preset's own value would break


def test_pixels_of_one_part_at_a_time_are_in_memory(tmp_path: Path, of: Callable[..., Any]) -> None:
    """An iteration of thousands of pairs would not fit: images are dropped once they are encoded."""
    run = built(tmp_path / "run", **of("dpo", sample_batch_size=12, validation_share=0.05), resolution=16)
    read: list[Any] = []

    def parts() -> Any:
        for n in (0, 4, 8):
            gc.collect()
            assert all(image() is None for image in read), "the part before is still held"
            loaded = [run.pairs.images.load(row) for row in run.pairs.split.source.read(range(n, n + 4))]
            read.extend(weakref.ref(image) for pair in loaded for image in pair)
            yield types.SimpleNamespace(prompts=["a"] * 4, labels=torch.ones(4), position=n + 4, loaded=loaded)
            del loaded

    inputs, position = run.pairs._inputs(parts(), 0, 0.0)
    assert inputs.latents.shape[1] == 12 and position == 12 and len(read) == 24
