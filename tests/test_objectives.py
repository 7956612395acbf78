"""Every objective's loss and gradient against its paper's formula in float64, term by term, and one number by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass, replace

import pytest
import torch
from golden_replay import load

from spo_fast.config.methods import METHODS, settings_of
from spo_fast.config.training import ObjectiveConfig, SampleConfig
from spo_fast.method.experience import Cond, Experience, Prediction, States, group_advantages
from spo_fast.method.noise import KeyedDraws
from spo_fast.method.objectives import SPO, make_objective
from spo_fast.method.policy_gradients import clipped_surrogate, over_global_std
from spo_fast.method.renoise import PairInputs, renoised_pairs
from spo_fast.method.schedule import StepTable, ddim_table, full_table

G = 3.0
CFG = SampleConfig(guidance_scale=G)
KINDS = ("epsilon", "v_prediction", "sample")


def randn(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def alphas() -> torch.Tensor:
    return load("ddim")[0]["alphas_cumprod"]


def table(kind: str = "epsilon") -> StepTable:
    return ddim_table(alphas(), 951 - 50 * torch.arange(20), 1.0, kind)


def made(method: str, far: float, kind: str = "epsilon", guided: bool = True):
    """An objective, an experience of 5 terms whose states are shared here and there, and the policy's outputs.

    far: how far the policy is from its baselines, so that few or most ratios lie outside the clamp.
    """
    objective = make_objective(ObjectiveConfig(method=method, beta=3.0))
    U, N, (K, S) = 7, 5, objective.shape
    generator = torch.Generator().manual_seed(1)
    index = torch.randint(U, (N, K, S), generator=generator)
    rows = torch.tensor([3, 0, 19, 11, 7, 16, 5])
    if method in ("gradspo", "stepgrpo"):
        index[:, 1] = index[:, 0]  # both children have one parent
    steps, x_t = table(kind), randn(U, 2, 3, 3, seed=2)

    def prediction(seed: int, scale: float, near: Prediction | None = None) -> Prediction:
        halves = [randn(U, 2, 3, 3, seed=seed + h, scale=scale) for h in range(2)]
        if near is not None:
            halves = [a + b for a, b in zip(halves, (near.cond, near.uncond), strict=True)]
        return Prediction(halves[0], halves[1] if guided else None)

    frozen = Prediction(*(randn(U, 2, 3, 3, seed=s) for s in (5, 6)))
    m = prediction(10, far, frozen)
    anchor = prediction(20, far, frozen)
    a, b, _, _, std = steps.coefficients[rows[index]].unbind(-1)
    shape = (N, K, S, 1, 1, 1)
    mean = a.view(shape) * x_t[index] + b.view(shape) * combined(frozen)[index]
    x_prev = mean + std.view(shape) * randn(N, K, S, 2, 3, 3, seed=30)
    if objective.samples_from == "data":
        x_prev = randn(N, K, S, 2, 3, 3, seed=31)
    cond = Cond({"x": torch.zeros(1, 1)}, {})
    states = States(x_t, rows, torch.zeros(U, dtype=torch.int64))
    if not guided:
        frozen = Prediction(frozen.cond, None)
    advantage = 4 * randn(*(N, K) if method == "stepgrpo" else (N,), seed=40)
    e = Experience(states, x_prev, index, cond, torch.empty(0), frozen, anchor, advantage)
    return objective, steps, e, m


def combined(m: Prediction) -> torch.Tensor:
    return m.cond if m.uncond is None else m.uncond + G * (m.cond - m.uncond)


# ---------------------------------------------------------------------------------------------- the papers' formulas


def log_p(m, steps, e, n, k, s):
    """log N(x_{t-1}; mean, std^2), mean over C, H, W."""
    u = int(e.index[n, k, s])
    a, b, _, _, std = steps.coefficients[e.states.rows[u]]
    mean = a * e.states.x_t[u] + b * combined(m)[u]
    return torch.distributions.Normal(mean, std).log_prob(e.x_prev[n, k, s]).mean()


def clamped(ratio, clip):
    return ratio if clip is None else ratio.clamp(1 - clip, 1 + clip)


def true_spo(o, m, steps, e, n):
    r = [clamped((log_p(m, steps, e, n, k, 0) - log_p(e.frozen, steps, e, n, k, 0)).exp(), o.clip) for k in range(2)]
    return -torch.sigmoid(o.beta * (r[0].log() - r[1].log())).log()


def true_ddpo(o, m, steps, e, n):
    r = (log_p(m, steps, e, n, 0, 0) - log_p(e.frozen, steps, e, n, 0, 0)).exp()
    advantage = e.advantage[n].clamp(-o.advantage_clip, o.advantage_clip)
    return torch.maximum(-advantage * r, -advantage * clamped(r, o.clip))


def true_dpok(o, m, steps, e, n):
    u = int(e.index[n, 0, 0])
    return true_ddpo(o, m, steps, e, n) + o.kl_weight * ((combined(m)[u] - combined(e.second_reference)[u]) ** 2).mean()


def kl(p, q, steps, e, n):
    """KL of the step's two Gaussians, mean over C, H, W."""
    u = int(e.index[n, 0, 0])
    _, b, _, _, std = steps.coefficients[e.states.rows[u]]
    return ((b * (combined(p)[u] - combined(q)[u])) ** 2).mean() / (2 * std**2)


def true_stepgrpo(o, m, steps, e, n):
    std, terms = steps.coefficients[e.states.rows[int(e.index[n, 0, 0])], 4], []
    for k in range(2):
        log_r = log_p(m, steps, e, n, k, 0) - log_p(e.frozen, steps, e, n, k, 0)
        r = (std * (log_r + kl(m, e.frozen, steps, e, n)) if o.guard_ratio else log_r).exp()
        advantage = e.advantage[n, k].clamp(-o.advantage_clip, o.advantage_clip)
        surrogate = torch.maximum(-advantage * r, -advantage * clamped(r, o.clip))
        terms.append((std if o.weight_by_std else 1) * surrogate + o.kl_weight * kl(m, e.second_reference, steps, e, n))
    return sum(terms) / 2


def true_grpo(o, m, steps, e, n):
    return true_ddpo(o, m, steps, e, n) + o.kl_weight * kl(m, e.second_reference, steps, e, n)


def of_states(m, steps, e, n):
    """c, d, x_t, x0 and three networks' outputs of a term."""
    u = int(e.index[n, 0, 0])
    c, d = steps.coefficients[e.states.rows[u], 2:4]
    return c, d, e.states.x_t[u], e.x_prev[n, 0, 0], *(p.cond[u] for p in (m, e.frozen, e.second_reference))


def true_nft(o, m, steps, e, n):
    c, d, x_t, x0, v, old, ref = of_states(m, steps, e, n)
    r = 0.5 + e.advantage[n].clamp(-o.advantage_clip, o.advantage_clip) / (2 * o.advantage_clip)
    errors = []
    for output in (o.beta * v + (1 - o.beta) * old, (1 + o.beta) * old - o.beta * v):
        x = c * x_t + d * output
        errors.append((((x - x0) ** 2) / (x - x0).detach().abs().mean().clamp_min(1e-5)).mean())
    policy = r * errors[0] / o.beta + (1 - r) * errors[1] / o.beta
    return o.advantage_clip * policy + o.kl_weight * ((v - ref) ** 2).mean()


def true_awm(o, m, steps, e, n):
    c, d, x_t, x0, v, old, ref = of_states(m, steps, e, n)
    y = (x0 - c * x_t) / d
    r = (((old - y) ** 2).mean() - ((v - y) ** 2).mean()).exp()
    advantage = e.advantage[n].clamp(-o.advantage_clip, o.advantage_clip) / o.advantage_clip
    surrogate = torch.maximum(-advantage * r, -advantage * r.clamp(1 - o.awm_clip, 1 + o.awm_clip))
    return surrogate + o.kl_weight * ((v - ref) ** 2).mean() + o.ema_weight * ((v - old) ** 2).mean()


def true_dense(o, m, steps, e, n):
    K, S = o.shape
    logits = [
        o.beta
        * sum(
            clamped((log_p(m, steps, e, n, k, s) - log_p(e.frozen, steps, e, n, k, s)).exp(), o.clip).log()
            for s in range(S)
        )
        / S
        for k in range(K)
    ]
    return -sum(logits[i] - torch.logsumexp(torch.stack(logits[i:]), 0) for i in range(K - 1))


def true_gradspo(o, m, steps, e, n):
    u = int(e.index[n, 0, 0])
    row = int(e.states.rows[u])
    alpha, (a, b, c, d, std) = alphas().double()[951 - 50 * row], steps.coefficients[row]
    sigma, x_t = (1 - alpha).sqrt(), e.states.x_t[u]

    def noise(p):  # whatever the network predicts
        return (x_t - alpha.sqrt() * (c * x_t + d * combined(p)[u])) / sigma

    mean = a * x_t + b * combined(e.second_reference)[u]  # any mean: it cancels
    z = [(e.x_prev[n, k, 0] - mean) / std for k in range(2)]
    r = []
    for sign in (1, -1):
        y = noise(e.second_reference) - sign * o.guidance_step * sigma * (z[0] - z[1]) / 2
        drop = -((noise(m) - y) ** 2).mean() + ((noise(e.frozen) - y) ** 2).mean()
        r.append(clamped(drop.exp(), o.clip))
    return -torch.sigmoid(o.beta * (r[0].log() - r[1].log())).log()


def error(p, e, n, k):
    return ((p.cond[int(e.index[n, k, 0])] - e.x_prev[n, k, 0]) ** 2).mean()


def true_dpo(o, m, steps, e, n):
    drop = [error(m, e, n, k) - error(e.frozen, e, n, k) for k in range(2)]
    return -torch.sigmoid(-(o.beta / 2) * (drop[0] - drop[1])).log()


def true_mapo(o, m, steps, e, n):
    w, loser = (error(m, e, n, k) for k in range(2))

    def f(x):
        return 0.5 * x / ((0.5 * x).exp() - 1)

    return w - o.beta * torch.nn.functional.logsigmoid(1000 * (f(w) - f(loser)))


TRUTH = {
    **dict.fromkeys(("spo", "mspo", "d3po", "lpo"), true_spo),
    "gradspo": true_gradspo,
    "ddpo": true_ddpo,
    "dpok": true_dpok,
    "stepgrpo": true_stepgrpo,
    "grpo": true_grpo,
    "nft": true_nft,
    "awm": true_awm,
    "dense": true_dense,
    "dpo": true_dpo,
    "mapo": true_mapo,
}


@pytest.mark.parametrize("clip", [0.1, 0.002, None])
@pytest.mark.parametrize("far", [0.0, 0.01, 0.3])
@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradient_match_the_paper(method, far, clip):
    objective, steps, e, m = made(method, far)
    names = {field.name for field in fields(objective)}
    if "clip" in names:
        objective = replace(objective, clip=clip)
    elif clip != 0.1:
        pytest.skip("it has no clamp")
    losses, gradients = [], []
    for which in ("ours", "truth"):
        leaf = Prediction(*(half.clone().requires_grad_() for half in m))
        if which == "ours":
            loss, stats = objective.loss(leaf, steps, e, CFG, 0.25)
        else:
            loss = 0.25 * sum(TRUTH[method](objective, leaf, steps, e, n) for n in range(len(e)))
        loss.backward()
        losses.append(loss.detach())
        # labelled pairs are denoised without guidance
        gradients.append(torch.stack([torch.zeros_like(h) if h.grad is None else h.grad for h in leaf]))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-8, atol=1e-11)
    assert stats.shape == (len(objective.stats),) and stats[0] == len(e) and not stats.requires_grad
    if far == 0.3 and clip == 0.002 and "clip" in METHODS[method].settings:
        outside = stats[objective.stats.index("clamped")] / len(e)
        assert outside > 0.5  # the clamp was met
    if far == 0.3 and clip is None:
        assert gradients[0].abs().max() > 1e-4


@pytest.mark.parametrize("far, clip", [(0.01, 0.1), (0.3, 0.1), (0.3, 0.002), (0.3, None)])
@pytest.mark.parametrize(
    "changed",
    [
        {"weight_by_std": True},
        {"guard_ratio": True},
        {"guard_ratio": True, "weight_by_std": True, "kl_weight": 0.0},
        {"advantage_clip": 0.5, "kl_weight": 3.0},
    ],
    ids=str,
)
def test_options_of_stepgrpo_match_their_formulas(changed, far, clip):
    objective, steps, e, m = made("stepgrpo", far)
    objective = replace(objective, clip=clip, **changed)
    kept = e if objective.kl_weight else replace(e, second_reference=None)  # then it is not evaluated
    check_loss(objective, steps, kept, m, lambda leaf, n: true_stepgrpo(objective, leaf, steps, e, n))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "method, changed",
    [
        ("nft", {"beta": 0.1, "advantage_clip": 1.0}),
        ("nft", {"beta": 1.0, "kl_weight": 0.5}),
        ("awm", {"awm_clip": 0.01, "ema_weight": 0.3}),
        ("awm", {"awm_clip": 2.0, "ema_weight": 0.0}),
    ],
    ids=str,
)
def test_forward_losses_whatever_the_network_predicts(method, changed, kind):
    objective, steps, e, m = made(method, 0.3, kind)
    objective = replace(objective, **changed)
    for sign in (1, -1):  # a clamp holds good terms above, bad ones below
        given = replace(e, advantage=sign * e.advantage)
        check_loss(objective, steps, given, m, lambda leaf, n, e=given: TRUTH[method](objective, leaf, steps, e, n))


def check_loss(objective, steps, e, m, truth):
    """Value and gradient against a term's formula."""
    found = []
    for ours in (True, False):
        leaf = Prediction(*(half.clone().requires_grad_() for half in m))
        loss = objective.loss(leaf, steps, e, CFG, 0.25)[0] if ours else sum(truth(leaf, n) for n in range(len(e))) / 4
        loss.backward()
        found.append([loss.detach(), *(torch.zeros_like(h) if h.grad is None else h.grad for h in leaf)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
    assert found[0][1].abs().max() > 1e-7


@pytest.mark.parametrize("kind", KINDS)
def test_first_gradient_of_stepgrpo_at_two_children_is_spos_over_half_beta(kind):
    """Advantages +-1, nothing clamped, the policy its own baseline; every transition weighs 1."""
    spo, steps, e, m = made("spo", 0.0, kind)
    index = e.index.clone()
    index[:, 1] = index[:, 0]
    e = replace(e, index=index, frozen=m, second_reference=None)
    of_two = replace(e, advantage=group_advantages(torch.tensor([[3.0], [1.0]]).double()).T.expand(len(e), 2).round())
    assert of_two.advantage[0].tolist() == [1, -1]
    step = make_objective(ObjectiveConfig(method="stepgrpo", kl_weight=0.0))
    gradients = []
    for objective, experience, weight in ((spo, e, 1.0), (step, of_two, 2.0)):  # two transitions a term
        leaf = Prediction(*(half.clone().requires_grad_() for half in m))
        objective.loss(leaf, steps, experience, CFG, weight)[0].backward()
        gradients.append(torch.stack([half.grad for half in leaf]))
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(gradients[1], gradients[0] / (spo.beta / 2), rtol=1e-10, atol=1e-12)


def test_group_advantages_by_hand():
    """Scores 1, 2, 6 of a prompt: mean 3, deviation sqrt((4 + 1 + 9) / 3) = 2.1602469; equal ones have none."""
    scores = torch.tensor([[1.0, 5.0], [2.0, 5.0], [6.0, 5.0]]).double()
    want = torch.tensor([[-2.0, 0.0], [-1.0, 0.0], [3.0, 0.0]]).double() / (14 / 3) ** 0.5
    torch.testing.assert_close(group_advantages(scores), want, rtol=1e-4, atol=1e-12)
    torch.testing.assert_close(group_advantages(scores)[:, 0], want[:, 0] / (1 + 1e-4 / (14 / 3) ** 0.5))
    # all six: mean 4, deviation sqrt((9 + 4 + 4 + 1 + 1 + 1) / 6) = 1.8257419
    e = replace(made("grpo", 0.0)[2], advantage=group_advantages(scores, global_std=True).flatten())
    want = torch.tensor([-2.0, 0, -1, 0, 3, 0]).double() / ((20 / 6) ** 0.5 + 1e-4)
    torch.testing.assert_close(over_global_std(e, scores.flatten()).advantage, want)


@pytest.mark.parametrize("kind", KINDS)
def test_gradspo_is_of_noise_whatever_the_network_predicts(kind):
    objective, steps, e, m = made("gradspo", 0.05, kind)
    loss, _ = objective.loss(m, steps, e, CFG, 1.0)
    want = sum(true_gradspo(objective, m, steps, e, n) for n in range(len(e)))
    torch.testing.assert_close(loss, want, rtol=1e-9, atol=1e-10)


def test_gradspo_without_clamp_does_not_depend_on_the_average():
    """r_w - r_l = 2 <m - m_ref, y_w - y_l>: why the average may stay that of the collection."""
    objective, steps, e, m = made("gradspo", 0.1)
    objective = replace(objective, clip=None)
    other = replace(e, second_reference=Prediction(*(half + 1 for half in e.second_reference)))
    losses = [objective.loss(m, steps, x, CFG, 1.0)[0] for x in (e, other)]
    torch.testing.assert_close(*losses, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", [m for m, record in METHODS.items() if not record.on_pairs])
def test_no_guidance(method):
    objective, steps, e, m = made(method, 0.05, guided=False)
    loss, _ = objective.loss(m, steps, e, replace(CFG, guidance_scale=1.0), 1.0)
    want = sum(TRUTH[method](objective, m, steps, e, n) for n in range(len(e)))
    torch.testing.assert_close(loss, want, rtol=1e-9, atol=1e-10)


# ---------------------------------------------------------------------------------------------- numbers made by hand

# one number for a latent, one row: mean = x_t + m, x0 = 2 x_t - sqrt(3) m (so alphabar = 1/4), std = 1/2; x_t = 0. The
# policy says .1, reference and old policy 0, the moving average .05; the winner's child is .3, the loser's -.1:
#   log p_policy - log p_ref of .3:  (-(.3 - .1)^2 + .3^2) / (2 / 4) = .1;  of -.1:  (-.2^2 + .1^2) / .5 = -.06
BY_HAND = {
    # log(1 + exp(-10 (.1 + .06)))
    "spo": ({"beta": 10, "clip": None}, 0.1839006),
    "mspo": ({"beta": 10, "clip": None}, 0.1839006),
    # .1 is clamped to log 1.1 = .0953102: log(1 + exp(-.1 (.0953102 + .06)))
    "d3po": ({"beta": 0.1, "clip": 0.1}, 0.6854118),
    # log(1 + exp(-500 (log 1.0001 - log .9999))) = log(1 + exp(-.1))
    "lpo": ({"beta": 500, "clip": 1e-4}, 0.6443967),
    # the shift is .5 sqrt(3/4) ((.3 + .1) / .5) / 2 = .1732051, y_w = -.1232051, y_l = .2232051;
    # r_w = .1232051^2 - .2232051^2 = -.0346410 = -r_l: log(1 + exp(10 * .0692820))
    "gradspo": ({"beta": 10, "clip": None}, 1.0983944),
    # advantage 2, ratio exp(.1) = 1.1051709, clamped 1.05: max(-2.2103, -2.1)
    "ddpo": ({"clip": 0.05}, -2.1),
    # and .5 times (.1 - .05)^2
    "dpok": ({"clip": 0.05, "kl_weight": 0.5}, -2.1 + 0.00125),
    # advantages 2 and -1 of the children .3 and -.1: max(-2.2103, -2.1) and max(.9418, .95): mean -.575; KL to the
    # average, (.1 - .05)^2 / (2 / 4) = .005, times .5
    "stepgrpo": ({"clip": 0.05, "kl_weight": 0.5}, -0.575 + 0.0025),
    "grpo": ({"clip": 0.05, "kl_weight": 0.5}, -2.1 + 0.0025),
    # x0 = -sqrt(3) m at x_t = 0, the sample is .3; beta .5: m+ = .05, m- = -.05, x0 -+.0866025; r = 1/2 + 2/10 = .7;
    # errors x^2 / |x| = |x|: .3866025 and .2133975: 5 (.7 .3866025 + .3 .2133975) / .5 + 2 (.1 - .05)^2
    "nft": ({"beta": 0.5, "kl_weight": 2.0}, 3.3464102 + 0.005),
    # y = -.3 / sqrt(3) = -.1732051: l = -(.2732051)^2, l_old = -(.1732051)^2: r = exp(-.0446410) = .9563407, clamped
    # .99; A = 2/5: max(-.3825, -.396); and 2 .05^2 + .5 .1^2
    "awm": ({"awm_clip": 0.01, "kl_weight": 2.0, "ema_weight": 0.5}, -0.3825363 + 0.01),
    # two steps each: means (.1 - .06) / 2 = .02 and -.06: log(1 + exp(-10 * .08))
    "dense": ({"beta": 10, "clip": None, "num_sampled_steps": 2}, 0.3711007),
    # targets .3 and -.1 of outputs .1 (reference 0): drops .09 - .04 and .01 - .04: log(1 + exp(-5 * .08))
    "dpo": ({"beta": 10}, 0.5130153),
    # errors .04 and .04: f alike: .04 + .1 log 2
    "mapo": ({"beta": 0.1}, 0.1093147),
}


@pytest.mark.parametrize("method", METHODS)
def test_number_by_hand(method):
    settings, want = BY_HAND[method]
    objective = make_objective(ObjectiveConfig(method=method, **settings))
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    coefficients = torch.tensor([[1.0, 1.0, 2.0, -math.sqrt(3), 0.5]], dtype=torch.float64)
    t, signal, noise = torch.tensor([500]), torch.tensor([0.5]).double(), torch.tensor([0.75]).double().sqrt()
    steps = StepTable(t, coefficients, signal, noise, t)
    children = {**dict.fromkeys(("ddpo", "dpok", "grpo", "nft", "awm"), [[0.3]]), "dense": [[0.3, -0.1], [-0.1, -0.1]]}
    x_prev = torch.tensor(children.get(method, [[0.3], [-0.1]]), dtype=torch.float64)
    e = Experience(
        States(0 * one, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)),
        x_prev.view(1, *objective.shape, 1, 1, 1),
        torch.zeros(1, *objective.shape, dtype=torch.int64),
        Cond({}, {}),
        torch.empty(0),
        frozen=Prediction(0 * one, None),
        second_reference=Prediction(0.05 * one, None),
        advantage=torch.tensor([[2.0, -1.0]] if method == "stepgrpo" else [2.0], dtype=torch.float64),
    )
    loss, _ = objective.loss(Prediction(0.1 * one, None), steps, e, SampleConfig(guidance_scale=1.0), 1.0)
    assert float(loss) == pytest.approx(want, abs=1e-6)


# ---------------------------------------------------------------------------------------------- published code


@pytest.mark.parametrize("dtype, name, tolerance", [(torch.float64, "f64", 1e-10), (torch.float32, "f32", 1e-5)])
@pytest.mark.parametrize("case", ["plain", "kl", "wide"])
def test_grpo_is_the_published_codes(case, dtype, name, tolerance):
    tensors, facts = load("grpo_loss")
    given = {k.removeprefix(f"{case}."): v for k, v in tensors.items() if k.startswith(f"{case}.")}
    setting, N = facts[case], facts[case]["N"]
    log_prob = given["log_prob"].to(dtype).requires_grad_()
    advantage = given["advantage"].to(dtype).clamp(-setting["adv_clip_max"], setting["adv_clip_max"])
    ratio = (log_prob - given["old_log_prob"].to(dtype)).exp()
    surrogate, _ = clipped_surrogate(ratio, advantage, setting["clip_range"])
    # the KL by the objective itself: steps whose mean is the network's output, without a surrogate
    rows = torch.zeros(N, 5, dtype=torch.float64)
    rows[:, 1], rows[:, 4] = 1, given["std"].flatten()
    steps, one = StepTable(*(torch.arange(N), rows, *[torch.ones(N).double()] * 2, torch.arange(N))), torch.arange(N)
    mean = given["mean"].to(dtype).requires_grad_()
    reference = Prediction(given["mean_ref"].to(dtype), None)
    e = Experience(
        States(0 * mean.detach(), one, 0 * one), reference.cond[:, None, None], one.view(-1, 1, 1), Cond({}, {}),
        torch.empty(0), frozen=reference, second_reference=reference, advantage=torch.zeros(N, dtype=dtype),
    )  # fmt: skip
    objective = make_objective(ObjectiveConfig(method="grpo", kl_weight=setting["beta"]))
    loss = (
        surrogate.mean() + objective.loss(Prediction(mean, None), steps, e, SampleConfig(guidance_scale=1.0), 1 / N)[0]
    )
    loss.backward()
    close = {"rtol": tolerance, "atol": tolerance, "check_dtype": False}
    torch.testing.assert_close(loss.detach().view(1), given[f"{name}.loss"].view(1), **close)
    torch.testing.assert_close(log_prob.grad, given[f"{name}.grad_log_prob"], **close)
    if setting["beta"]:
        torch.testing.assert_close(mean.grad, given[f"{name}.grad_mean"], **close)
    assert log_prob.grad.abs().max() > 0.01 and (case != "plain" or (log_prob.grad == 0).any())


@pytest.mark.parametrize("dtype, name, tolerance", [(torch.float64, "f64", 1e-10), (torch.float32, "f32", 1e-5)])
@pytest.mark.parametrize("case", ["beta1", "beta_01"])
def test_nft_is_the_published_codes(case, dtype, name, tolerance):
    tensors, facts = load("nft_loss")
    given = {k.removeprefix(f"{case}."): v for k, v in tensors.items() if k.startswith(f"{case}.")}
    setting, B = facts[case], facts[case]["B"]
    coefficients = torch.zeros(B, 5, dtype=torch.float64)
    coefficients[:, 2], coefficients[:, 3] = 1, -given["sigma"]
    one = torch.arange(B)
    steps = StepTable(one, coefficients, 1 - given["sigma"], given["sigma"], one)
    policy, old, reference, x_t, x0 = (given[k].to(dtype) for k in ("policy", "old", "reference", "x_t", "x0"))
    objective = make_objective(
        ObjectiveConfig(
            method="nft", beta=setting["beta"], kl_weight=setting["kl_weight"], advantage_clip=setting["adv_clip_max"]
        )
    )
    e = Experience(
        States(x_t, one, 0 * one), x0[:, None, None], one.view(-1, 1, 1), Cond({}, {}), torch.empty(0),
        Prediction(old, None), Prediction(reference, None), given["advantage"].to(dtype),
    )  # fmt: skip
    leaf = policy.clone().requires_grad_()
    loss, _ = objective.loss(Prediction(leaf, None), steps, e, SampleConfig(guidance_scale=1.0), 1 / B)
    loss.backward()
    close = {"rtol": tolerance, "atol": tolerance, "check_dtype": False}
    torch.testing.assert_close(loss.detach().view(1), given[f"{name}.loss"].view(1), **close)
    torch.testing.assert_close(leaf.grad, given[f"{name}.grad_policy"], **close)


# ---------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("method", METHODS)
def test_a_record_names_what_its_class_reads(method):
    """Each setting changes what the class does: no field is there in vain, and none is missing in the record."""
    objective = make_objective(ObjectiveConfig(method=method))
    assert set(METHODS[method].settings) == set(settings_of(type(objective)))
    inherited = {f.name for c in type(objective).__mro__[1:] if is_dataclass(c) for f in fields(c)}
    assert {f.name for f in fields(objective)} - set(METHODS[method].settings) <= inherited
    assert all(hasattr(ObjectiveConfig, name) for name in METHODS[method].settings)


def test_a_record_that_names_other_settings_than_its_class_is_an_error():
    with pytest.raises(ValueError, match="record spo names"):
        replace(METHODS["spo"], settings=("beta",)).kind()


@dataclass(frozen=True, kw_only=True)
class OwnLoss(SPO):
    tau: float = 0.1

    def loss(self, m, table, e, cfg, weight):
        return self.tau * m.cond.sum(), m.cond.new_zeros(7)


@dataclass(frozen=True, kw_only=True)
class OwnLossAndSPOs(SPO):
    tau: float = 0.1

    def loss(self, m, table, e, cfg, weight):
        loss, stats = super().loss(m, table, e, cfg, weight)
        return self.tau * loss, stats


def beta_of(objective):
    return objective.beta


@dataclass(frozen=True, kw_only=True)
class OwnLossByAHelper(OwnLoss):
    def loss(self, m, table, e, cfg, weight):
        return beta_of(self) * m.cond.sum(), m.cond.new_zeros(7)


@dataclass(frozen=True, kw_only=True)
class OwnLossAndSPOsByName(SPO):
    def loss(self, m, table, e, cfg, weight):
        return SPO.loss(self, m, table, e, cfg, weight)


def test_a_subclass_reads_only_what_its_own_code_reads():
    assert settings_of(OwnLoss) == ("tau",) and settings_of(OwnLossAndSPOs) == ("beta", "clip", "tau")
    assert set(settings_of(OwnLossByAHelper)) == {"beta"} and settings_of(OwnLossAndSPOsByName) == ("beta", "clip")


# ---------------------------------------------------------------------------------------------- labelled pairs


@pytest.mark.parametrize("kind", KINDS)
def test_renoised_pairs_share_timestep_and_noise(kind):
    B, steps = 6, full_table(alphas(), kind)
    latents = randn(2, B, 4, 5, 3, seed=1)
    cond = Cond({"x": torch.arange(B)[:, None]}, {})
    draws = KeyedDraws(3, 4, torch.arange(B))
    e = renoised_pairs(steps, PairInputs(cond, latents, draws))
    assert e.index.shape == (B, 2, 1) and len(e.states) == 2 * B and len(e.scores) == 0
    assert len(set(steps.timesteps[e.states.rows].tolist())) > 1
    for b in range(B):
        states = e.states.select(e.index[b, :, 0])
        t = steps.timesteps[states.rows]
        assert t[0] == t[1] and states.prompts.tolist() == [b, b]
        alpha = alphas().double()[t[0]]
        noises = [(states.x_t[k] - alpha.sqrt() * latents[k, b]) / (1 - alpha).sqrt() for k in range(2)]
        torch.testing.assert_close(noises[0], noises[1], rtol=1e-9, atol=1e-9)
        want = {
            "epsilon": lambda k, z=noises[0], a=alpha: z,
            "v_prediction": lambda k, z=noises[0], a=alpha, b=b: a.sqrt() * z - (1 - a).sqrt() * latents[k, b],
            "sample": lambda k, b=b: latents[k, b],
        }[kind]
        for k in range(2):
            torch.testing.assert_close(e.x_prev[b, k, 0], want(k), rtol=1e-8, atol=1e-8)
    assert len({tuple(row) for row in e.states.x_t[:B].flatten(1).tolist()}) == B
    other = renoised_pairs(steps, PairInputs(cond, latents, replace(draws, iteration=5)))
    assert not torch.equal(other.states.rows, e.states.rows)


def test_float32_target_is_the_noise():
    steps = full_table(alphas(), "epsilon")
    latents = randn(2, 64, 4, 8, 8, seed=2).float()
    draws = KeyedDraws(0, 0, torch.arange(64))
    e = renoised_pairs(steps, PairInputs(Cond({}, {}), latents, draws))
    wide = renoised_pairs(steps, PairInputs(Cond({}, {}), latents.double(), draws))
    assert (e.x_prev.double() - wide.x_prev).abs().max() < 1e-4
