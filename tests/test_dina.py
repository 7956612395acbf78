"""DiNa-LRM, a flow's latent judge, against its formulas written out on diffusers' own blocks, in float64."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from runs import Killed, assert_same_end, facts, killed_run, run_toy
from torch import Tensor

from spo_fast import train, train_spm
from spo_fast.method.experience import Candidates, Cond
from spo_fast.method.flow_schedule import sigma_of
from spo_fast.models.files.toy import FLOW_WEIGHTS
from spo_fast.scorers.dina import DinaScorer, init_dina, load_dina_reward, save_dina
from spo_fast.scorers.dina_network import DinaReward, DinaSettings
from spo_fast.toy.build import write_pairs
from spo_fast.training.plan.fake_run import predict
from spo_fast.training.preference_model import thurstone_loss
from spo_fast.training.preference_run import PreferenceRun

B, WIDTH = 3, 32
CASES = {
    "as published": DinaSettings(3, (1, 2, 3), (1, 2, 3), rank=4, alpha=8),
    "before the first block": DinaSettings(4, (0, 2, 4), (1,), rank=2, alpha=8, num_queries=2, use_proj_in=True),
    "no text": DinaSettings(2, (2,), (), rank=4, alpha=4, width=16, num_attn_heads=4),
}


def network(seed: int = 0) -> SD3Transformer2DModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SD3Transformer2DModel(
            sample_size=16,
            in_channels=4,
            num_layers=6,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=32,
            caption_projection_dim=WIDTH,
            pooled_projection_dim=16,
            out_channels=4,
            pos_embed_max_size=24,
            dual_attention_layers=(0, 1),
            qk_norm="rms_norm",
        )


class Base:
    """A model as far as the judge asks for it."""

    device = torch.device("cpu")

    def fresh_network(self, dtype: torch.dtype) -> SD3Transformer2DModel:
        return network().to(dtype)

    def cond(self, prompts: list[str]) -> Cond:
        g = torch.Generator().manual_seed(len(prompts))
        shapes = {"prompt_embeds": (10, 32), "pooled": (16,)}
        return Cond({n: torch.randn(len(prompts), *s, generator=g).double() for n, s in shapes.items()}, {})


def judge(settings: DinaSettings) -> DinaReward:
    """One whose weights that train are all away from where they start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = DinaReward(network(), settings).double()
        for p in model.parameters():
            if p.requires_grad:
                p.data += 0.1 * torch.randn_like(p)
    return model


def inputs() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(2)
    shapes = {"x": (B, 4, 16, 16), "sigma": (B,), "context": (B, 10, 32), "pooled": (B, 16)}
    found = {name: torch.randn(shape, generator=g).double() for name, shape in shapes.items()}
    return found | {"sigma": found["sigma"].sigmoid()}


def states_of(
    weights: dict[str, Tensor], s: DinaSettings, x: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The LoRA added to diffusers' own blocks: the embedding of time, states of picture and text."""
    own = network().double()
    for name, A in weights.items():
        if ".lora_A." in name:
            layer = own.get_submodule(name.removeprefix("backbone.").split(".lora_A.")[0])
            layer.weight.data += s.alpha / s.rank * weights[name.replace("lora_A", "lora_B")] @ A
    temb = own.time_text_embed(1000 * sigma, pooled)
    h, c = own.pos_embed(x), own.context_embedder(context)
    pictures, texts = [h], [c]
    for block in own.transformer_blocks[: s.num_transformer_layers]:
        c, h = block(hidden_states=h, encoder_hidden_states=c, temb=temb)
        pictures.append(h)
        texts.append(c)
    return temb, pictures, texts


def written_out(weights: dict[str, Tensor], s: DinaSettings, **given: Tensor) -> Tensor:
    """The published forward."""
    temb, pictures, texts = states_of(weights, s, **given)

    def linear(name: str, v: Tensor) -> Tensor:
        return v @ weights[f"reward_head.{name}.weight"].T + weights[f"reward_head.{name}.bias"]

    def rms(name: str, v: Tensor) -> Tensor:
        return v / (v.square().mean(-1, True) + torch.finfo(v.dtype).eps).sqrt() * weights[f"reward_head.{name}.weight"]

    def adapted(kind: str, states: list[Tensor]) -> Tensor:
        parts = []
        for i, state in enumerate(states):
            at = f"layer_adapters_{kind}.{i}"
            v = linear(f"{at}.proj_in", state) if f"reward_head.{at}.proj_in.weight" in weights else state
            gamma, beta = linear(f"{at}.cond_mlp.2", F.silu(linear(f"{at}.cond_mlp.0", temb)))[:, None].chunk(2, -1)
            parts.append(linear(f"{at}.proj", v * (1 + gamma) + beta + weights[f"reward_head.{at}.layer_embed"]))
        return linear(f"agg_{kind}", torch.cat(parts, -1))

    def attended(at: str, q: Tensor, tokens: Tensor, kind: str) -> Tensor:
        keys, values = linear(f"{at}.to_k_{kind}", tokens), linear(f"{at}.to_v_{kind}", tokens)
        if at == "attn1":
            values = values * linear(f"{at}.gate_{kind}.2", F.silu(linear(f"{at}.gate_{kind}.0", tokens))).sigmoid()
        out = []
        for q_h, k_h, v_h in zip(*(v.chunk(s.num_attn_heads, -1) for v in (q, keys, values)), strict=True):
            out.append((q_h @ k_h.transpose(1, 2) / math.sqrt(q_h.shape[-1])).softmax(-1) @ v_h)
        return torch.cat(out, -1)

    picture = adapted("visual", [pictures[i] for i in s.visual_head_idx])
    queries = weights["reward_head.query_tokens"].expand(B, -1, -1)
    for at in ("attn1", "attn2"):
        q = linear(f"{at}.to_q", rms(f"{at}.norm_q", queries))
        found = attended(at, q, rms(f"{at}.norm_v", picture), "vis")
        if at == "attn1" and s.text_head_idx:
            text = adapted("text", [texts[i] for i in s.text_head_idx])
            found = found + attended(at, q, rms(f"{at}.norm_t", text), "text")
        queries = queries + linear(f"{at}.to_out.0", found)
    queries = queries + linear("ff.2", F.gelu(linear("ff.0", rms("norm_ff", queries))))
    return linear("head", queries).mean(1)[:, 0]


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_scores_are_those_of_the_formulas(settings: DinaSettings) -> None:
    model, given = judge(settings), inputs()
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    found = model(given["x"], given["sigma"], (given["context"], given["pooled"]))
    want = written_out(weights, settings, **given)
    assert want.std() > 0.01
    torch.testing.assert_close(found.double(), want, rtol=1e-6, atol=1e-6)  # the score is told in float32
    found.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_files_are_the_published_ones(settings: DinaSettings, tmp_path: Path) -> None:
    """Their names and PEFT's; what is saved is read back to the bit."""
    model, given = judge(settings), inputs()
    save_dina(model, tmp_path, {name: p for name, p in model.named_parameters() if p.requires_grad})
    lora = json.loads((tmp_path / "checkpoint/backbone_lora/adapter_config.json").read_text())
    assert (lora["r"], lora["lora_alpha"], lora["peft_type"]) == (settings.rank, settings.alpha, "LORA")
    head = torch.load(tmp_path / "checkpoint/rm_head.pt", weights_only=True)
    some = {"query_tokens", "attn1.gate_vis.2.weight", "layer_adapters_visual.0.cond_mlp.2.bias", "ff.2.weight"}
    assert some <= set(head)
    again = load_dina_reward(tmp_path, Base(), torch.float64)
    arguments = given["x"], given["sigma"], (given["context"], given["pooled"])
    assert again.settings == settings and again(*arguments).equal(model(*arguments))


def test_wrong_files_are_named(tmp_path: Path) -> None:
    model = judge(CASES["as published"])
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(FileNotFoundError, match="is no DiNa-LRM. Expected a directory with config.json and"):
        load_dina_reward(tmp_path, Base())
    save_dina(model, tmp_path, weights)
    config = json.loads((tmp_path / "config.json").read_text())

    def with_(**changes: Any) -> str:
        (tmp_path / "config.json").write_text(json.dumps({"model": config["model"] | changes}))
        with pytest.raises(ValueError) as raised:
            load_dina_reward(tmp_path, Base())
        return str(raised.value)

    assert "features after blocks (1, 2, 30, 1, 2, 3) of 30, but the network has 6" in with_(
        num_transformer_layers=30, visual_head_idx=[1, 2, 30]
    )
    assert "block 6 is the network's last, which gives no text" in with_(num_transformer_layers=6, text_head_idx=[6])
    assert "does not fit the model's blocks and config.json: backbone." in with_(num_transformer_layers=4)
    assert "use_logistic=True" in with_(use_logistic=True) and "freeze_backbone=True" in with_(freeze_backbone=True)
    assert "is no DiNa-LRM's: its `model` lacks or misstates" in with_(lora_config=None)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is no DiNa-LRM's"):
        load_dina_reward(tmp_path, Base())


def test_a_new_one_judges_by_half_of_the_blocks_and_starts_as_the_model() -> None:
    model = init_dina(Base(), seed=3)
    assert model.settings == DinaSettings.of_blocks(6, 32) == DinaSettings(3, (1, 2, 3), (1, 2, 3))
    assert DinaSettings.of_blocks(24, 1536) == DinaSettings()  # SD3.5-medium: the published numbers
    assert not any(p.any() for name, p in model.named_parameters() if "lora_B" in name)
    same, other = init_dina(Base(), seed=3), init_dina(Base(), seed=4)
    assert same.reward_head.query_tokens.equal(model.reward_head.query_tokens)
    assert not other.reward_head.query_tokens.equal(model.reward_head.query_tokens)


def test_the_scorer_tells_sigma_and_finished_latents_get_noise() -> None:
    model, given = judge(CASES["as published"]), inputs()
    scorer = DinaScorer(model, Base())
    text = scorer.encode(["a", "b", "c"])
    rows = torch.cat([given["x"], 2 * given["x"]])
    for t in (0, 351, 999):
        told = Candidates(rows, rows, torch.tensor(t), tuple(p.repeat(2, *[1] * (p.ndim - 1)) for p in text), 2, len, 4)
        sigma = sigma_of(torch.tensor([t])).float().expand(3)
        want = torch.cat([model(part, sigma, text) for part in (given["x"], 2 * given["x"])])
        torch.testing.assert_close(scorer(told), want, rtol=1e-5, atol=1e-6)
    last = Candidates(None, given["x"], torch.tensor(0), text, 1, len, 4)
    noise = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    want = model(0.6 * given["x"] + 0.4 * noise, torch.full((3,), 0.4), text)
    torch.testing.assert_close(scorer(last), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("labels", [(1.0, 0.0), (0.5, 1.0)])
def test_the_loss_is_one_less_the_fidelity(labels: tuple[float, float]) -> None:
    scores = torch.tensor([[0.3, -1.0], [-0.2, 0.7]]).double().requires_grad_()
    sigma, weights = torch.tensor([0.1, 0.9]).double(), torch.tensor([0.25, 0.75]).double()
    found = thurstone_loss(scores, sigma, torch.tensor(labels).double(), weights)
    want = 0.0
    for n, label in enumerate(labels):
        v = 2 * float(sigma[n]) ** 2 + 0.05
        z = float((scores[0, n] - scores[1, n]).detach()) / math.sqrt(2 * v + 1e-6)
        p = (1 + math.erf(z / math.sqrt(2))) / 2
        fidelity = math.sqrt(label * (p + 1e-6)) + math.sqrt((1 - label) * (1 - p + 1e-6))
        want += float(weights[n]) * (1 - fidelity)
    assert float(found.detach()) == pytest.approx(want, abs=1e-12)
    found.backward()
    assert scores.grad is not None and bool(scores.grad.isfinite().all()) and scores.grad.any()


# ---------------------------------------------------------------------------------------------- the commands


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A judge of two steps, and its pairs."""
    directory = tmp_path_factory.mktemp("dina")
    write_pairs(directory / "pairs.parquet", 100, seed=0)
    assert train_spm.main([*flags(directory), "--output_dir", str(directory / "whole")]) == 0
    return directory / "whole", directory / "pairs.parquet"


def flags(directory: Path) -> list[str]:
    line = (
        "--model toy-flow --parameterisation latent --max_train_steps 4 --validation_share 0.2 --checkpointing_steps 2"
    )
    line += " --train_batch_size 4"
    return [*line.split(), "--gradient_accumulation_steps", "2", "--pairs", str(directory / "pairs.parquet")]


def test_training_resumes_to_the_bit(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, pairs = trained
    line = [*flags(pairs.parent), "--output_dir", str(tmp_path / "part")]
    iterate = PreferenceRun.iterate

    def dies(run: PreferenceRun, *rest: Any) -> Any:
        if run.state.iteration == 3:
            raise Killed
        return iterate(run, *rest)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(PreferenceRun, "iterate", dies)
        train_spm.main(line)
    assert not (tmp_path / "part/preference_model").exists()
    assert train_spm.main([*line, "--resume_from_checkpoint", "latest"]) == 0
    for name in ("backbone_lora/adapter_model.safetensors", "rm_head.pt"):
        a, b = (d / "preference_model/checkpoint" / name for d in (whole, tmp_path / "part"))
        assert a.read_bytes() == b.read_bytes()
    losses = [r["loss"] for r in facts(whole)]
    assert len(losses) == 4 and all(0 < loss < 1 for loss in losses)


def test_spo_is_judged_by_it_and_resumes(trained: tuple[Path, Path], tmp_path: Path, monkeypatch: Any) -> None:
    settings: dict[str, Any] = {
        "model": "toy-flow",
        "scorer": ("dina",),
        "dina_path": str(trained[0] / "preference_model"),
        "threshold": -1.0,
        "branch_start": 1,
        "max_train_steps": 2,
        "checkpointing_steps": 1,
    }
    whole = run_toy(tmp_path / "whole", **settings)
    part = killed_run(tmp_path / "part", monkeypatch, after=1, **settings)
    run_toy(part, **settings, resume_from_checkpoint="latest")
    assert_same_end(whole, part)
    assert [r["pairs"] > 0 for r in facts(whole)] == [True, True]


def test_it_is_counted(trained: tuple[Path, Path]) -> None:
    """A score a child, half of the blocks each, and no decoder; its weights are held."""
    line = ["--model", "toy-flow", "--num_candidates", "3", "--sample_batch_size", "4"]
    dina = ["--scorer", "dina", "--dina_path", str(trained[0] / "preference_model")]
    judged, seen = (predict(train.parse([*line, *own]).with_fields(fuse=False), None, "cpu") for own in (dina, []))
    assert judged.samples["score"] == seen.samples["score"] > 0
    assert seen.samples["decode"] > 0 and "decode" not in judged.samples
    weights = json.loads((trained[0] / "preference_model/config.json").read_text())["model"]
    model = DinaReward(
        SD3Transformer2DModel.from_pretrained(FLOW_WEIGHTS / "transformer"), DinaSettings.read(weights, "")
    )
    assert judged.resident["scorer dina"] == pytest.approx(sum(4 * p.numel() for p in model.parameters()), rel=0.01)


def test_models_that_have_no_such_blocks_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for line, said in (
        ("--model flux --scorer dina", "made of SD3's blocks, which cannot judge latents of flux"),
        ("--model sdxl --scorer dina", "made of SD3's blocks, which cannot judge latents of sdxl"),
        ("--model toy-flow --method lpo", "Use spo, with scorer=dina"),
    ):
        assert train.main([*line.split(), "--output_dir", "unused"]) == 1
        assert said in capsys.readouterr().err
    line = "--model flux --parameterisation latent --pairs x --output_dir unused"
    assert train_spm.main(line.split()) == 1 and "made of SD3's blocks" in capsys.readouterr().err
