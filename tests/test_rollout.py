"""Rollouts against a step-by-step rollout written out here, with diffusers' DDIMScheduler in float64 as the sampler."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from diffusers import DDIMScheduler
from golden_replay import conditioning, load, networks, policy, spm
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from spo_fast.config.training import Config, SampleConfig
from spo_fast.method.experience import Cond, Prediction
from spo_fast.method.noise import KeyedDraws, permutation
from spo_fast.method.objectives import SPO
from spo_fast.method.rollout import RolloutBatch, Sampler, branching_rollout, rollout_segments, segments
from spo_fast.method.schedule import ddim_table
from spo_fast.models.graphs import Graphs
from spo_fast.training.checkpoint import TrainState
from spo_fast.training.learner import Learner

# ---------------------------------------------------------------------------------------------------- stand-ins


class Net:
    """A policy whose network is a formula: sees x_t, t and the prompt, and counts its calls."""

    device, dtype, graphs = torch.device("cpu"), torch.float64, Graphs(None)

    def __init__(self):
        self.calls, self.rows = 0, 0

    def precompute_text(self, cond, guided):
        return cond

    def predict(self, x_t, t, cond, guided):
        self.calls, self.rows = self.calls + 1, self.rows + len(x_t) * (2 if guided else 1)
        t = t.double() / 1000 if t.ndim == 0 else t.double().view(-1, 1, 1, 1) / 1000
        prompt = cond.cond["prompt_embeds"].view(-1, 1, 1, 1)
        out = torch.tanh(0.7 * x_t + prompt * (0.3 + t)) + 0.1 * x_t.roll(1, -1)
        base = torch.tanh(0.7 * x_t + cond.uncond["prompt_embeds"].view(1, 1, 1, 1) * (0.3 + t))
        return Prediction(out, base if guided else None)


def decode(latents):
    return torch.tanh(latents[:, :3] + 0.2 * latents[:, 3:])


def judge(pixels, t, text):
    """(N,) scores with wide gaps, so that no decision hangs on rounding."""
    return (
        40 * (pixels * torch.linspace(-1, 1, pixels[0].numel()).view(pixels.shape[1:])).mean((1, 2, 3)) * (1 + t / 1000)
        + text
    )


class Scorer:
    def __init__(self):
        self.decoded = 0

    def __call__(self, candidates):
        scores = []
        for rows, pixels in candidates.pixel_chunks():
            self.decoded += len(pixels)
            scores.append(judge(pixels, candidates.t, candidates.text[rows]))
        return torch.cat(scores)


class SeededDraws:
    """Draws of named steps, the same whatever the order they are asked for."""

    def __init__(self, B, shape, seed):
        self.B, self.shape, self.seed = B, shape, seed

    def _generator(self, *key):
        return torch.Generator().manual_seed(hash((self.seed, *key)) % 2**31)

    def latents(self, shape, dtype):
        return torch.randn(self.B, *shape, generator=self._generator(0), dtype=dtype)

    def children(self, step, num_children, num_parents):
        noise = torch.randn(
            num_children * num_parents, self.B, *self.shape, generator=self._generator(1, step), dtype=torch.float64
        )
        return {"noise": noise.view(num_children, num_parents * self.B, *self.shape)}

    def picks(self, steps, num_candidates):
        return (self.pick(step, num_candidates) for step in steps)

    def pick(self, step, num_candidates):
        return torch.randint(0, num_candidates, (self.B,), generator=self._generator(2, step))


def alphas():
    return load("ddim")[0]["alphas_cumprod"]


def scheduled(cfg, B=3, shape=(4, 6, 5), seed=0, prediction_type="epsilon"):
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=prediction_type,
    )  # fmt: skip
    scheduler.alphas_cumprod = alphas().double()
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(cfg.num_steps)
    table = ddim_table(alphas(), scheduler.timesteps, cfg.eta, prediction_type)
    prompts = torch.linspace(-0.8, 1.1, B, dtype=torch.float64).view(B, 1)
    cond = Cond({"prompt_embeds": prompts}, {"prompt_embeds": torch.zeros(1, 1, dtype=torch.float64)})
    draws = SeededDraws(B, shape, seed)
    return scheduler, table, RolloutBatch(cond, 3 * prompts[:, 0], draws, shape, torch.float64)


def reference_rollout(scheduler, batch, cfg):  # noqa: C901  the published loop, written out
    """One prompt and one candidate at a time, following the published control flow (a counter of inner steps left).

    Yields per comparison [(t, shared, x_t of both, x_prev of both, prompt)] of kept prompts, in the order of the
    rollout.
    """
    net, B, K, n = Net(), len(batch), cfg.num_candidates, cfg.num_steps
    t = scheduler.timesteps

    def guided(x, i, b):
        m = net.predict(x[None], t[i], batch.cond.select(torch.tensor([b])), True)
        if cfg.guidance_scale <= 1:
            return m.cond
        return m.uncond + cfg.guidance_scale * (m.cond - m.uncond)

    def step(m, x, i, noise):
        out = scheduler.step(m, t[i], x[None], eta=cfg.eta, variance_noise=noise[None])
        return out.prev_sample[0], out.pred_original_sample[0]

    def compare(scores):  # K numbers -> winner, loser, kept
        order = sorted(range(K), key=lambda k: -scores[k])
        w, l = order[0], order[-1]  # noqa: E741
        probability = torch.tensor([scores[w], scores[l]]).double().softmax(0)
        return w, l, bool(probability[0] - probability[1] > cfg.threshold)

    def collect(out, path, steps, decisions):
        for s, i in enumerate(steps):
            for b in range(B):
                w, l, kept = decisions[b]  # noqa: E741
                if kept:
                    pair = [torch.stack([path[s + d][k][b] for k in (w, l)]) for d in (0, 1)]
                    out.append((int(t[i]), s == 0, *pair, b))

    out = []
    x = list(batch.draws.latents(batch.latent_shape, torch.float64))
    for i in range(cfg.branch_start):
        noise = batch.draws.children(i, 1, 1)["noise"][0]
        x = [step(guided(x[b], i, b), x[b], i, noise[b])[0] for b in range(B)]
    candidates, path, steps, left = None, [], [], 0
    for i in range(cfg.branch_start, n):
        extend = cfg.last_step == "extend" and i == n - 1 and candidates is not None
        if left == 0 and not extend:
            if candidates is not None:
                decisions, start = [], []
                pick = batch.draws.pick(i, K)
                for b in range(B):
                    noise = torch.zeros(batch.latent_shape, dtype=torch.float64)
                    x0 = [step(guided(candidates[k][b], i, b), candidates[k][b], i, noise)[1] for k in range(K)]
                    scores = [float(judge(decode(v[None]), t[i], batch.text[b : b + 1])) for v in x0]
                    decisions.append(compare(scores))
                    k = {"random": int(pick[b]), "winner": decisions[b][0], "loser": decisions[b][1]}[cfg.next_start]
                    start.append(candidates[k][b])
                collect(out, path, steps, decisions)
                x = start
            noise = batch.draws.children(i, K, 1)["noise"]
            candidates = [[step(guided(x[b], i, b), x[b], i, noise[k][b])[0] for b in range(B)] for k in range(K)]
            path, steps, left = [[x] * K, candidates], [i], cfg.num_inner_steps
        else:
            noise = batch.draws.children(i, 1, K)["noise"][0].view(K, B, *batch.latent_shape)
            candidates = [
                [step(guided(candidates[k][b], i, b), candidates[k][b], i, noise[k][b])[0] for b in range(B)]
                for k in range(K)
            ]
            path.append(candidates)
            steps.append(i)
            left = max(left - 1, 0)
    decisions = [
        compare(
            [float(judge(decode(candidates[k][b][None]), torch.tensor(0), batch.text[b : b + 1])) for k in range(K)]
        )
        for b in range(B)
    ]
    collect(out, path, steps, decisions)
    return out


CASES = {
    "spo": {},
    "k2": {"num_candidates": 2},
    "k7": {"num_candidates": 7, "threshold": 0.1},
    "mspo": {"num_candidates": 2, "num_inner_steps": 3, "threshold": 0.4},
    "ragged last group": {"num_inner_steps": 4, "num_candidates": 3},
    "comparison on the last step": {"num_steps": 14, "num_inner_steps": 2},
    "comparison on the last step, extended": {"num_steps": 14, "num_inner_steps": 2, "last_step": "extend"},
    "no inner steps, extended": {"num_steps": 9, "last_step": "extend"},
    "one group": {"num_inner_steps": 40},
    "from the first step": {"branch_start": 0, "num_steps": 6},
    "only the last step": {"branch_start": 9, "num_steps": 10, "threshold": 0.0},
    "only the last step, extended": {"branch_start": 9, "num_steps": 10, "threshold": 0.0, "last_step": "extend"},
    "every pair": {"threshold": -1.0, "num_steps": 10},
    "no pair": {"threshold": 0.999999, "num_steps": 8},
    "no guidance": {"guidance_scale": 1.0},
    "guidance below one": {"guidance_scale": 0.5, "num_steps": 10},
    "eta": {"eta": 0.3},
    "winner next": {"next_start": "winner"},
    "loser next": {"next_start": "loser", "num_inner_steps": 1},
}


OTHERS = [(name, kind) for name in ("spo", "mspo", "eta") for kind in ("v_prediction", "sample")]


@pytest.mark.parametrize("name, prediction_type", [*((name, "epsilon") for name in CASES), *OTHERS])
def test_rollout_matches_one_candidate_at_a_time(name, prediction_type):
    cfg = SampleConfig(**CASES[name])
    scheduler, table, batch = scheduled(cfg, prediction_type=prediction_type)
    net = Net()
    e = branching_rollout(Sampler(net, table, Scorer(), decode, cfg, 5), batch)
    want = reference_rollout(scheduler, batch, cfg)
    assert len(e) == len(want)
    assert (len(want) == 0) == (name == "no pair")
    for i, (t, shared, x_t, x_prev, prompt) in enumerate(want):
        states = e.states.select(e.index[i, :, 0])
        assert table.timesteps[states.rows].tolist() == [t, t] and states.prompts.tolist() == [prompt, prompt]
        assert (e.index[i, 0, 0] == e.index[i, 1, 0]) == shared
        torch.testing.assert_close(states.x_t, x_t, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(e.x_prev[i, :, 0], x_prev, rtol=1e-9, atol=1e-9)
    assert len(e.states) == sum(1 if shared else 2 for _, shared, *_ in want)
    assert net.calls == cfg.num_steps


def test_segments_cover_every_branching_step_once():
    for start, inner, n, last in itertools.product(range(4), range(4), range(4, 12), ("compare", "extend")):
        cfg = SampleConfig(branch_start=start, num_inner_steps=inner, num_steps=n, last_step=last)
        covered = [i for first, end in segments(cfg) for i in range(first, end)]
        assert covered == list(range(start, n))
        longest = inner + 1 + (last == "extend")
        assert all(1 <= end - first <= longest for first, end in segments(cfg))


# ---------------------------------------------------------------------------------------------------- counted costs


class Counter:
    """Counts the calls and rows of a module or function."""

    def __init__(self):
        self.calls, self.rows = 0, 0

    def hook(self, module, args, kwargs, output):
        self.calls, self.rows = self.calls + 1, self.rows + len(args[0])


@pytest.mark.parametrize(
    "kind, batch_size, cfg, most",
    [
        ("sd15", 10, SampleConfig(threshold=-1.0), (1300, 640)),
        ("sdxl", 2, SampleConfig(num_candidates=2, num_inner_steps=3, threshold=-1.0, last_step="extend"), (140, 16)),
    ],
)
def test_cost_of_a_rollout_at_the_published_batch(kind, batch_size, cfg, most):
    unet, decode_ = networks(kind, torch.float32)
    counter, decoded, scored, scorer = Counter(), [], Counter(), spm()
    unet.register_forward_hook(counter.hook, with_kwargs=True)
    scorer.model.vision_model.register_forward_hook(scored.hook, with_kwargs=True)
    golden, _ = load(f"rollout_{'sd15_k4' if kind == 'sd15' else 'sdxl_k2_inner3'}")
    cond = conditioning(golden, torch.float32).select(torch.arange(batch_size) % 2)
    text = scorer.encode_ids(golden["in.spm_input_ids"])[torch.arange(batch_size) % 2]
    batch = RolloutBatch(cond, text, KeyedDraws(1, 0, torch.arange(batch_size)), (4, 8, 8), torch.float32)

    def counted_decode(latents):
        decoded.append(len(latents))
        return decode_(latents)

    steps = ddim_table(alphas(), 951 - 50 * torch.arange(20), 1.0, "epsilon")
    trained = policy(unet)
    e = branching_rollout(Sampler(trained, steps, scorer, counted_decode, cfg, 16), batch)
    assert counter.calls == cfg.num_steps
    assert (counter.rows, sum(decoded), scored.rows) == (most[0], most[1], most[1])
    pairs = batch_size * 16
    assert len(e) == pairs and len(e.states) == (pairs if kind == "sd15" else pairs * 7 // 4)

    # training: each unique state once for the policy and once for the reference, both guidance halves in one call
    counter.calls = counter.rows = 0
    learner = Learner(trained, SPO(beta=10.0, clip=0.1), steps, Config(sample=cfg).with_fields(train_batch_size=16), 1)
    learner.update(learner.objective.prepare(trained, steps, e, cfg, None), TrainState())
    assert counter.rows == 2 * 2 * len(e.states)


# ---------------------------------------------------------------------------------------------------- keyed noise


def test_batch_of_eight_draws_what_two_of_four_draw():
    cfg = SampleConfig(num_candidates=3, num_inner_steps=1, threshold=-1.0, num_steps=8, branch_start=2)
    _, table, whole = scheduled(cfg, B=8)
    index = torch.tensor([5, 17, 3, 40, 8, 21, 2, 9])  # global prompt indices

    def rollout(rows):
        text = whole.text[rows]
        draws = KeyedDraws(7, 2, index[rows])
        batch = RolloutBatch(whole.cond.select(rows), text, draws, whole.latent_shape, torch.float32)
        return rollout_segments(Sampler(Net(), table, Scorer(), decode, cfg), batch)

    both = [rollout(torch.arange(4)), rollout(torch.arange(4, 8))]
    all_at_once = rollout(torch.arange(8))
    # the same draws, bit for bit, and so the same candidates at every branching step of a network that has no batch
    # effects
    assert torch.equal(all_at_once.x_t, torch.cat([s.x_t for s in both], 2))
    assert torch.equal(all_at_once.x_prev, torch.cat([s.x_prev for s in both], 2))
    one = KeyedDraws(7, 2, index)
    for a, b in (([0, 1, 2, 3], [4, 5, 6, 7]), ([0], [1, 2, 3, 4, 5, 6, 7])):
        parts = [KeyedDraws(7, 2, index[rows]) for rows in (a, b)]
        assert torch.equal(
            one.latents((4, 9, 7), torch.float32), torch.cat([p.latents((4, 9, 7), torch.float32) for p in parts])
        )
        assert torch.equal(next(one.picks([3], 4)), torch.cat([next(p.picks([3], 4)) for p in parts]))


def test_every_draw_of_a_rollout_is_different():
    draws = KeyedDraws(7, 2, torch.arange(3))
    seen = [draws.latents((4, 8, 8), torch.float32)]
    from spo_fast.ops import philox

    for step in range(3):
        seen.append(philox.normal(draws.children(step, 1, 4)["keys"], 256).view(-1, 4, 8, 8))
    rows = torch.cat(seen).flatten(1)
    assert len(torch.unique(rows, dim=0)) == len(rows) == 3 + 3 * 12
    one, two = draws.picks([1, 2], 1000)
    assert not torch.equal(one, two)
    for step, pick in ((1, one), (2, two)):  # the number that the step alone would get
        words = philox.words(torch.stack([torch.tensor([7, 2, p, (2 << 24) + step, 0]) for p in range(3)]), 1)
        assert torch.equal(pick, (words[0][:, 0] * 1000) >> 32)
    other = KeyedDraws(7, 3, torch.arange(3))
    assert not torch.equal(draws.latents((4, 8, 8), torch.float32), other.latents((4, 8, 8), torch.float32))


def test_permutation_is_keyed_and_complete():
    assert sorted(permutation(100, 1, 2).tolist()) == list(range(100))
    assert torch.equal(permutation(100, 1, 2), permutation(100, 1, 2))
    assert not torch.equal(permutation(100, 1, 2), permutation(100, 1, 3))
    assert permutation(0, 1, 2).tolist() == [] and permutation(1, 1, 2).tolist() == [0]


# ---------------------------------------------------------------------------------------------------- no host sync


class NoHostTensors(TorchDispatchMode):
    """Fails on tensors made from Python values in the middle of a computation: on CUDA each is a blocking copy."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.lift_fresh.default and args[0].numel() > 1:
            raise AssertionError("a tensor was made from Python values inside the rollout")
        return func(*args, **(kwargs or {}))


def test_rollout_copies_nothing_to_the_device():
    cfg = SampleConfig(num_candidates=3, num_inner_steps=1, num_steps=8)
    _, table, batch = scheduled(cfg)
    draws = KeyedDraws(1, 0, torch.arange(3))
    batch = dataclasses.replace(batch, draws=draws, dtype=torch.float32)
    with NoHostTensors():
        rollout_segments(Sampler(Net(), table, Scorer(), decode, cfg), batch)
    with pytest.raises(AssertionError), NoHostTensors():
        torch.zeros(3)[[0, -1]]


@pytest.mark.parametrize("inner", [0, 3])
def test_rollout_reads_nothing_from_the_device(inner):
    """Under FakeTensorMode a tensor has no values: any read (.item(), bool(), indexing by a mask) raises."""
    cfg = SampleConfig(num_candidates=2, num_inner_steps=inner, num_steps=8)
    unet, decode_ = networks("sdxl", torch.float32)
    scorer, golden = spm(), load("rollout_sdxl_k2_inner3")[0]
    trained = policy(unet)
    text = scorer.encode_ids(golden["in.spm_input_ids"])
    steps = ddim_table(alphas(), 951 - 50 * torch.arange(8), 1.0, "epsilon")
    cond, index = conditioning(golden, torch.float32), torch.arange(2)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {name: mode.from_tensor(v) for name, v in cond.cond.items()}
        batch = RolloutBatch(
            Cond(fake, cond.uncond),
            mode.from_tensor(text),
            KeyedDraws(1, 0, mode.from_tensor(index)),
            (4, 8, 8),
            torch.float32,
        )
        s = rollout_segments(Sampler(trained, steps, scorer, decode_, cfg), batch)
        assert s.x_t.shape == (4, 2, 2, 4, 8, 8) and s.valid.shape == (4, 2)
        assert isinstance(s.valid, torch._subclasses.FakeTensor)
        with pytest.raises(Exception, match="[Dd]ata|nonzero|fake"):
            s.compact(batch.cond)  # the one read
