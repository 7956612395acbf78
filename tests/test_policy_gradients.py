"""Step-wise GRPO, windows of GRPO, samples of NFT and AWM: what they learn from, against loops written out here."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import SMALL, built, command_line
from test_flow_iteration import directories, exact, make  # noqa: F401
from test_methods import Starts
from test_objectives import randn
from test_rollout import Net, Scorer, decode, judge, scheduled

from spo_fast import train
from spo_fast.config.scorers import judged_range, name_and_weight
from spo_fast.config.training import ObjectiveConfig, SampleConfig
from spo_fast.method.experience import Candidates
from spo_fast.method.flow_schedule import flow_table
from spo_fast.method.noise import KeyedDraws
from spo_fast.method.objectives import make_objective
from spo_fast.method.rollout import Sampler, rollout_segments, window_at
from spo_fast.method.schedule import ddim_table
from spo_fast.scorers.weighted import Normalised, WeightedSum
from spo_fast.training import batches
from spo_fast.training.monitor.timer import Timer
from spo_fast.training.processes import ALONE
from spo_fast.training.rollout_statistics import Pictures, spread

SHAPE = (4, 6, 5)


class Averaged(Net):
    """A policy whose moving average predicts otherwise."""

    within = False

    @contextlib.contextmanager
    def ema(self):
        self.within = True
        yield
        self.within = False

    def predict(self, x_t, t, cond, guided):
        m = super().predict(x_t, t, cond, guided)
        return m._replace(cond=m.cond + 0.3 * self.within)


# ------------------------------------------------------------------------------------------------- a step's children


def steps_of_a_flow() -> Any:
    return flow_table(torch.linspace(1, 0, 7).double(), 0.7, "flow_sde")


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("K", [2, 5])
def test_all_children_of_a_step_are_one_term_of_one_state(K: int, flow: bool) -> None:
    cfg = SampleConfig(num_candidates=K, num_steps=6, branch_start=2, guidance_scale=3.0)
    _, table, batch = scheduled(cfg)
    if flow:
        table = steps_of_a_flow()
    sampler = Sampler(Net(), table, Scorer(), decode, cfg)
    e = make_objective(ObjectiveConfig(method="stepgrpo")).collect(sampler, batch)
    assert e.index.shape == (3 * 4, K, 1) and len(e.states) == 3 * 4 == e.index[..., 0].numel() / K  # U = N / K
    assert (e.index == e.index[:, :1]).all() and e.advantage.shape == (12, K)
    pairs = rollout_segments(sampler, batch)  # SPO's on the same draws
    for n in range(len(e)):
        u = int(e.index[n, 0, 0])
        row, b = int(e.states.rows[u]), int(e.states.prompts[u])
        assert torch.equal(e.states.x_t[u], pairs.x_t[row - 2, 0, b])
        a, c, _, _, std = table.coefficients[row]
        m = Net().predict(e.states.x_t[u : u + 1], table.timesteps[row], batch.cond.select(torch.tensor([b])), True)
        mean = a * e.states.x_t[u] + c * (m.uncond + 3 * (m.cond - m.uncond))[0]
        noise = batch.draws.children(row, K, 1)["noise"][:, b]
        torch.testing.assert_close(e.x_prev[n, :, 0], mean + std * noise, rtol=1e-9, atol=1e-9)
        scores = e.scores.view(4, K, 3)[row - 2, :, b]
        want = (scores - scores.mean()) / (scores.var(correction=0).sqrt() + 1e-4)
        torch.testing.assert_close(e.advantage[n], want, rtol=1e-9, atol=1e-12)
        best, worst = int(e.advantage[n].argmax()), int(e.advantage[n].argmin())
        for side, k in enumerate((best, worst)):
            assert torch.equal(e.x_prev[n, k, 0], pairs.x_prev[row - 2, side, b])


def test_a_dead_zone_leaves_out_steps_whose_children_score_alike() -> None:
    cfg = SampleConfig(num_candidates=3, num_steps=6, branch_start=2)
    _, table, batch = scheduled(cfg)

    def scores(candidates: Any) -> torch.Tensor:  # of prompt 0 all alike, of 1 by .5 apart, of 2 by 2
        return (torch.tensor([0.0, 0.25, 1.0]) * torch.arange(3)[:, None]).flatten().double()

    for zone, prompts in ((None, {0, 1, 2}), (0.0, {1, 2}), (0.5, {2}), (3.0, set())):
        objective = make_objective(ObjectiveConfig(method="stepgrpo", dead_zone=zone))
        e = objective.collect(Sampler(Net(), table, scores, decode, cfg), batch)
        assert set(e.states.prompts.tolist()) == prompts and len(e) == 4 * len(prompts)
        assert bool((e.advantage[e.states.prompts[e.index[:, 0, 0]] == 0] == 0).all())


@pytest.mark.parametrize("start", ["winner", "loser"])
def test_next_start_is_of_scores_not_of_numbers(start: str) -> None:
    cfg = SampleConfig(num_candidates=3, num_steps=6, branch_start=2, next_start=start)
    _, table, batch = scheduled(cfg)
    e = make_objective(ObjectiveConfig(method="stepgrpo")).collect(Sampler(Net(), table, Scorer(), decode, cfg), batch)
    for n in range(len(e) - 3):  # terms: step after step, prompts within
        k = int(e.advantage[n].argmax() if start == "winner" else e.advantage[n].argmin())
        assert torch.equal(e.states.x_t[int(e.index[n + 3, 0, 0])], e.x_prev[n, k, 0])


def test_a_step_costs_one_forward_and_one_backward_whatever_k(tmp_path: Path) -> None:
    rows = {}
    for K in (2, 6):
        run = built(tmp_path / f"{K}", method="stepgrpo", threshold=None, num_candidates=K, train_batch_size=4)
        batches.encode_first(run)
        trained: list[int] = []
        run.policy.network.register_forward_hook(
            lambda _, args, out, seen=trained: seen.append(len(out[0])) if out[0].requires_grad else None  # type: ignore[misc]
        )
        record = run.iterate(0, Timer())
        assert record["states"] == record["pairs"] == 2 * 2 and float(record["ratio"]) == 1
        assert float(record["approx_kl"]) == 0 and abs(float(record["loss"])) < 1e-4
        rows[K] = trained
    assert rows[2] == rows[6] and sum(rows[2]) == 2 * 4  # guided: two rows a state


# ------------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize("flow", [False, True])
def test_noise_is_added_within_the_window_only(flow: bool) -> None:
    """Against the steps written out: of a diffusion diffusers' DDIM, of a flow its SDE and Euler."""
    cfg = SampleConfig(num_candidates=3, num_steps=6, branch_start=0, guidance_scale=2.0)
    scheduler, table, batch = scheduled(cfg)
    batch = dataclasses.replace(batch, draws=Starts(3, SHAPE, 0), iteration=3)
    ode = ddim_table(scheduler.alphas_cumprod.float(), scheduler.timesteps, 0.0, "epsilon")
    sigmas = torch.linspace(1, 0, 7).double()
    if flow:
        table, ode = steps_of_a_flow(), flow_table(sigmas, 0.0)
    objective = make_objective(ObjectiveConfig(method="grpo", grpo_window="1:3", window_moves=2))
    e = objective.collect(Sampler(Net(), table, Scorer(), decode, cfg, ode=ode), batch)
    assert sorted(set(e.states.rows.tolist())) == [2, 3] and len(e) == 2 * 3 * 3  # moved once by iteration 3
    x = batch.draws.latents(SHAPE, torch.float64, 3).view(3, 3, *SHAPE)
    for i in range(6):
        noise = batch.draws.children(i, 1, 3)["noise"].view_as(x)
        for k in range(3):
            m = Net().predict(x[k], table.timesteps[i], batch.cond, True)
            m = m.uncond + 2 * (m.cond - m.uncond)
            if not flow:
                eta = 1.0 if i in (2, 3) else 0.0
                t = scheduler.timesteps[i]
                x[k] = scheduler.step(m, t, x[k], eta=eta, variance_noise=noise[k] if eta else None).prev_sample
                continue
            s, dt = sigmas[i], sigmas[i + 1] - sigmas[i]
            if i in (2, 3):  # flow_grpo's sde step
                std = 0.7 * (s / (1 - s)).sqrt()
                mean = x[k] * (1 + std**2 / (2 * s) * dt) + m * (1 + std**2 * (1 - s) / (2 * s)) * dt
                x[k] = mean + std * (-dt).sqrt() * noise[k]
            else:
                x[k] = x[k] + dt * m
        if i in (2, 3):
            here = e.states.rows[e.index[:, 0, 0]] == i
            torch.testing.assert_close(e.x_prev[here, 0, 0], x.flatten(0, 1), rtol=1e-8, atol=1e-8)
    want = judge(decode(x.flatten(0, 1)), torch.tensor(0), batch.text.repeat(3)).view(3, 3)
    torch.testing.assert_close(e.scores.view(3, 3), want, rtol=1e-8, atol=1e-8)
    advantage = (want - want.mean(0)) / (want.var(0, correction=0).sqrt() + 1e-4)
    torch.testing.assert_close(e.advantage, advantage.flatten().repeat(2), rtol=1e-6, atol=1e-8)


def test_a_window_moves_and_returns() -> None:
    assert [window_at("1:3", 2, 5, i) for i in range(9)] == [
        *((1, 3), (1, 3), (2, 4), (2, 4), (3, 5), (3, 5), (1, 3), (1, 3), (2, 4))
    ]
    assert window_at("0:4", None, 10, 1000) == (0, 4) and window_at("0:10", 1, 10, 7) == (0, 10)


# ------------------------------------------------------------------------------------------------- finished pictures


@pytest.mark.parametrize("method", ["nft", "awm"])
def test_pictures_of_the_old_policy_are_noised_to_every_step(method: str) -> None:
    cfg = SampleConfig(num_candidates=2, num_steps=5, branch_start=1, branch_end=4, guidance_scale=1.0)
    _, _, batch = scheduled(cfg)
    sigmas = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2, 0.0]).double()
    table, net = flow_table(sigmas, 0.0), Averaged()
    draws = dataclasses.replace(batch, draws=KeyedDraws(1, 0, torch.arange(3)), dtype=torch.float64)
    settings = ObjectiveConfig(method=method, advantage_std="prompt")
    e = make_objective(settings).collect(Sampler(net, table, Scorer(), decode, cfg), draws)
    x0 = draws.draws.latents(SHAPE, torch.float64, 2)
    for i in range(5):  # Euler, by the average, without guidance
        m = net.predict(x0, table.timesteps[i], draws.cond.select(torch.arange(3).repeat(2)), False).cond + 0.3
        x0 = x0 + (sigmas[i + 1] - sigmas[i]) * m
    assert len(e) == 3 * 2 * 3 and e.states.rows.tolist() == [i for i in (1, 2, 3) for _ in range(6)]
    torch.testing.assert_close(e.x_prev[:, 0, 0], x0.repeat(3, 1, 1, 1), rtol=1e-9, atol=1e-9)
    assert e.states.prompts.tolist() == [0, 1, 2] * 6
    s = sigmas[e.states.rows].view(-1, 1, 1, 1)
    noise = (e.states.x_t - (1 - s) * e.x_prev[:, 0, 0]) / s
    assert abs(float(noise.mean())) < 0.05 and abs(float(noise.std()) - 1) < 0.05
    assert torch.unique(noise.round(decimals=5), dim=0).shape[0] == 18  # none is used twice
    scores = judge(decode(x0), torch.tensor(0), draws.text.repeat(2)).view(2, 3)
    advantage = (scores - scores.mean(0)) / (scores.var(0, correction=0).sqrt() + 1e-4)
    torch.testing.assert_close(e.advantage, advantage.flatten().repeat(3), rtol=1e-6, atol=1e-8)


def test_the_old_policy_moves_once_an_iteration_by_its_schedule(tmp_path: Path) -> None:
    settings = {"method": "nft", "guidance_scale": 1.0, "threshold": None, "train_batch_size": 2, "num_steps": 4}
    run = built(tmp_path / "run", **settings, learning_rate=1e-2)
    batches.encode_first(run)
    old = {name: v.clone() for name, v in run.policy.state_dict().items()}
    for iteration in range(3):
        during = []
        step = run.learner.step
        run.learner.step = lambda step=step, seen=during: (  # type: ignore[method-assign, misc]
            step(), seen.append([v.clone() for v in run.policy.averages])
        )[0]  # fmt: skip
        run.iterate(iteration, Timer())
        run.learner.step = step  # type: ignore[method-assign]
        assert len(during) > 1  # optimizer steps, in which it stood still
        assert all(torch.equal(v, was) for now in during for v, was in zip(now, old.values(), strict=True))
        decay = min(0.001 * run.state.optimizer_steps, 0.5)
        old = {n: decay * old[n] + (1 - decay) * v for n, v in run.policy.state_dict().items()}
        for name, v in run.policy.average_state_dict().items():
            torch.testing.assert_close(v, old[name], rtol=1e-6, atol=1e-8)
        old = {name: v.clone() for name, v in run.policy.average_state_dict().items()}
    assert decay > 0
    objective = make_objective(ObjectiveConfig(method="nft"))
    assert [objective.decay_after(n) for n in (0, 1, 499, 500, 10_000)] == [0, 0.001, 0.499, 0.5, 0.5]


@pytest.mark.parametrize("method", ["grpo", "nft"])
def test_deviation_of_all_scores(tmp_path: Path, method: str) -> None:
    settings = {"method": method, "threshold": None, "advantage_std": "global", "guidance_scale": 1.0}
    run = built(tmp_path / "run", **settings)
    batches.encode_first(run)
    seen: list[Any] = []
    judged = type(run.objective).judged
    object.__setattr__(run.objective, "judged", lambda e, s: seen.append(judged(run.objective, e, s)) or seen[-1])
    run.iterate(0, Timer())
    scores = seen[0].scores.view(2, 2).double()  # (K, B)
    want = (scores - scores.mean(0)) / (scores.flatten().var(correction=0).sqrt() + 1e-4)
    torch.testing.assert_close(seen[0].advantage.double(), want.flatten().repeat(2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "line, words",
    [
        ("--method nft --guidance_scale 3", "trains without guidance: guidance_scale=3 must be 1"),
        ("--method awm --eta 0.5", "--eta is not read by --method awm"),
        ("--method grpo --grpo_window 3", "grpo_window=3 must be FIRST:END of them, as 0:20"),
        ("--method grpo --grpo_window 4:25", "trains the steps 0 to 20"),
        ("--method grpo --grpo_window 4:4", "grpo_window=4:4 must be"),
        ("--method grpo --window_moves 25", "has no --grpo_window"),
        ("--method stepgrpo --last_step extend", "last_step=extend joins two steps"),
        ("--method stepgrpo --num_inner_steps 2", "num_inner_steps must be 0"),
        ("--scorer spm:1@900-100", "two timesteps of 0 to 1000, the lower first"),
        ("--scorer spm@0-1001", "two timesteps of 0 to 1000"),
        ("--scorer spm@0", "after the @ stand two timesteps"),
        ("--scorer spm:x@0-9", "must be a number"),
        ("--scorer spm:1@0-200 pickscore:1@500-1000", "no scorer judges at t = "),
        ("--scorer spm:1@1-1000", "no scorer judges at t = 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, words: str
) -> None:
    arguments = ["--model", "toy", "--output_dir", str(tmp_path / "run"), "--max_train_steps", "1", *line.split()]
    assert train.main(arguments) != 0
    error = capsys.readouterr().err
    assert words in error and len(error) < 300 and "Traceback" not in error


# ------------------------------------------------------------------------------------------------- flow models


@pytest.mark.parametrize(
    "kind, method, settings, states",
    [
        ("sd35", "stepgrpo", {"sampler": "flow_sde", "branch_start": 3, "num_candidates": 3}, 3 * 5),
        ("flux", "stepgrpo", {"branch_start": 1, "num_candidates": 2, "kl_weight": 0.1}, 3 * 5),  # of 8 but two
        ("sd35", "grpo", {"num_candidates": 2, "num_steps": 4, "grpo_window": "1:3"}, 3 * 2 * 2),
        ("flux", "nft", {"num_candidates": 2, "num_steps": 4, "advantage_std": "global"}, 3 * 2 * 4),
        ("sd35", "awm", {"num_candidates": 2, "num_steps": 4, "guidance_scale": 1.0}, 3 * 2 * 4),
    ],
    ids=str,
)
def test_an_iteration_on_flows(
    make: Any,  # noqa: F811
    kind: str,
    method: str,
    settings: dict[str, Any],
    states: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before the first step policy, old policy and reference are one: ratios are 1, and every distance is 0."""
    # one optimizer step; the tables and the networks: test_flow_iteration.py
    run = make(kind, method=method, train_batch_size=states, gradient_accumulation_steps=1, **settings)
    seen: list[Any] = []
    update = run.learner.update
    monkeypatch.setattr(run.learner, "update", lambda e, *rest: seen.append(e) or update(e, *rest))  # type: ignore[func-returns-value]
    record = run.iterate(0, Timer())
    assert record["states"] == states and record["optimizer_steps"] == 1 and record["grad_norm"] > 0
    assert float(record["kl"]) == 0 and float(record.get("old_distance", 0)) == 0
    if method != "nft":
        assert float(record["ratio"]) == 1 and abs(float(record["loss"])) < 1e-6
    else:  # r times an error and 1 - r times the same
        e = seen[0]
        x0 = e.states.x_t - run.table.noise[e.states.rows].view(-1, 1, 1, 1) * e.frozen.cond
        x0, clean = x0[e.index.flatten()], e.x_prev[:, 0, 0]
        error = ((x0 - clean) ** 2).mean((1, 2, 3)) / (x0 - clean).abs().mean((1, 2, 3))
        torch.testing.assert_close(float(record["loss"]), float(5 * error.mean()))
    advantage = seen[0].advantage.double()
    assert abs(float(advantage.mean())) < 1e-6 and advantage.abs().max() > 0.1


# ------------------------------------------------------------------------------------------------- scorers by noise


class Constant:
    """Scores of pictures: a number times their mean, so many times asked."""

    def __init__(self, factor: float):
        self.factor, self.asked = factor, 0

    def encode(self, prompts: list[str]) -> torch.Tensor:
        return torch.zeros(len(prompts), 1)

    def score_pixels(self, pixels: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        self.asked += len(pixels)
        return self.factor * pixels.mean((1, 2, 3)).float()

    def __call__(self, candidates: Any) -> torch.Tensor:
        raise AssertionError("pictures are decoded once for all")


def test_each_scorer_judges_within_its_timesteps() -> None:
    a, b = Constant(1.0), Constant(10.0)
    both = WeightedSum([a, b], [2.0, 0.5], [(0, 500), (500, 1000)])
    x0 = randn(6, 3, 4, 4, seed=1).float()
    mean = x0.mean((1, 2, 3))
    for t, want, asked in ((0, 2 * mean, (6, 0)), (500, 7 * mean, (6, 6)), (501, 5 * mean, (0, 6))):
        a.asked = b.asked = 0
        text = (torch.zeros(6, 1),) * 2
        given = Candidates(None, x0, torch.tensor(t), text, 3, lambda z: z, decode_chunk=4)
        for candidates in (given, dataclasses.replace(given, at=t)):
            torch.testing.assert_close(both(candidates), want)
        assert (a.asked, b.asked) == tuple(2 * n for n in asked)
    assert judged_range("my_file:score:0.5@10-20") == (10, 20) and judged_range("spm:1") == (0, 1000)
    assert name_and_weight("my_file:score:0.5@10-20") == ("my_file:score", "0.5")
    assert name_and_weight("spm@0-750") == ("spm", "")


def test_a_rollout_tells_scorers_the_timestep_they_ask_for() -> None:
    cfg = SampleConfig(num_candidates=2, num_steps=6, branch_start=2)
    _, table, batch = scheduled(cfg)
    a, b = Constant(1.0), Constant(1e3)
    half = int(table.judged_at[4])
    scorer = WeightedSum([a, b], [1.0, 1.0], [(0, half), (half + 1, 1000)])
    batch = dataclasses.replace(batch, text=scorer.encode([""] * 3))
    segments = rollout_segments(Sampler(Net(), table, scorer, decode, cfg), batch)
    size = segments.scores.view(4, 6).abs().amax(1)  # judged at steps 3, 4, 5 and the end
    assert size[0] > 10 and (size[1:] < 1).all() and (a.asked, b.asked) == (18, 6)


def test_scores_are_brought_to_one_scale_and_logged_on_their_own() -> None:
    a, b = Constant(1.0), Constant(-1e3)
    x0 = randn(6, 3, 4, 4, seed=1).float()
    normalised = Normalised(WeightedSum([a, b], [2.0, 0.5]))
    given = Candidates(None, x0, torch.tensor(0), (torch.zeros(6, 1),) * 2, 3, lambda z: z)
    mean = x0.mean((1, 2, 3)).double().view(3, 2)
    std, centred = mean.var(0, correction=0).sqrt(), mean - mean.mean(0)
    want = 2 * centred / (std + 1e-4) - 0.5 * 1e3 * centred / (1e3 * std + 1e-4)
    torch.testing.assert_close(normalised(given).double(), want.flatten(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat(normalised.raw).double(), (2 - 500) * mean.flatten(), rtol=1e-4, atol=1e-5)


def test_runs_by_noise_level_and_on_one_scale(tmp_path: Path) -> None:
    scorers, found = ["spm:1@0-400", "pickscore:0.5@300-1000"], []
    for normalised in (False, True):
        run = built(tmp_path / f"{normalised}", scorer=scorers, normalise_scorers=normalised)
        batches.encode_first(run)
        found.append(run.iterate(0, Timer()))
    plain, scaled = found
    # what is logged are the scores themselves, of the same first candidates
    assert float(plain["score_mean"]) == pytest.approx(float(scaled["score_mean"]), rel=0.2)
    assert plain["pairs"] == scaled["pairs"] == 4
    line = command_line({**SMALL, "output_dir": tmp_path / "c", "scorer": scorers, "normalise_scorers": True})
    assert train.main([*line, "--dry_run"]) == 0


# ------------------------------------------------------------------------------------------------- signs of collapse


def test_spread_and_diversity_by_hand() -> None:
    scores = torch.tensor([[[1.0, 2.0], [1.0, 6.0]], [[0.0, 3.0], [4.0, 3.0]]])  # (J, K, B): 1 1, 2 6, 0 4, 3 3
    assert spread(scores) == {"group_std": torch.tensor(1.0), "flat_groups": torch.tensor(0.5)}
    pictures = Pictures(lambda latents: latents)
    grey = torch.tensor([0.2, -0.4, 0.6, -0.4]).view(4, 1, 1, 1).expand(4, 3, 16, 16)  # K = 2 of B = 2: k-major
    pictures(grey[:3]), pictures(grey[3:])
    found = pictures.record(ALONE, slice(0, 2), 2)
    # in [0, 1]: .6 and .8 differ by .2, .3 and .3 by nothing
    assert float(found["diversity"]) == pytest.approx(0.1, abs=1e-6) and float(found["saturation"]) == 0
