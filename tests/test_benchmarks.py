"""The benchmarks at tiny size: contenders compute the same thing, and the runner always leaves records."""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import math
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import bench_graph, bench_libraries, cpu_spm, gpu_run, iteration, networks, shapes
from benchmarks.records import Records, command, quantiles, read
from benchmarks.timing import relative_error

KINDS = shapes.KINDS


def technique(row: str, mixed_precision: str = "no") -> iteration.Technique:
    return dataclasses.replace(iteration.ROWS[row], mixed_precision=mixed_precision, scorer_dtype="no")


def tiny(kind: str, mixed_precision: str = "no", rollouts: bool = False) -> iteration.Setup:
    return iteration.Setup(kind, "tiny", "cpu", None, mixed_precision, rollouts=rollouts)


# ---------------------------------------------------------------------------------------------------- shapes


def test_lora_of_sdxl_has_the_published_size():
    matrices = shapes.lora_shapes("sdxl", 64)
    assert len(matrices) == 2 * 560
    assert sum(a * b for a, b in matrices) == 92_897_280


def test_random_networks_have_the_published_sizes():
    def parameters(module):
        return sum(p.numel() for p in module.parameters())

    meta = ("full", "meta", torch.float16)
    assert parameters(networks.make_unet("sdxl", *meta)) == 2_567_463_684
    assert parameters(networks.make_unet("sd15", *meta)) == 859_520_964
    assert [parameters(e) // 10**6 for e in networks.make_text_encoders("sdxl", *meta)] == [123, 694]
    spm = networks.make_spm("full", "meta", torch.float32).model
    assert len(spm.state_dict()) == 980 and round(parameters(spm) / 1e5) == 13062


def test_bytes_of_a_transition_are_those_of_its_tensors():
    from benchmarks.bench_transition import log_ratio_case, transition_case

    case = transition_case(shapes.StepShape("x", 3, 2, (4, 8, 8)), torch.float16, "cpu", ())
    cond, uncond, x_t, _, _ = case.make(0)
    _, children = case.truth(*case.make(0))
    assert case.bytes_moved == cond.nbytes + uncond.nbytes + x_t.nbytes + children.float().nbytes
    case = log_ratio_case(shapes.RatioShape("x", 2, 4, (4, 8, 8)), torch.float16, "cpu", (), backward=True)
    inputs = case.make(0)
    assert case.bytes_moved == 2 * sum(v.nbytes for v in inputs) + inputs[0].nbytes + inputs[1].nbytes


@pytest.mark.parametrize("kind, forwards, decodes", [("sd15", 1300, 640), ("sdxl", 140, 16)])
def test_published_rollout_costs_what_was_counted(kind, forwards, decodes):
    """UNet sample-forwards and decodes of one published rollout, as in golden/rollout_cost_counts.json."""
    setup = tiny(kind)
    loop = iteration.Published(setup, technique("published")).loop
    setup.cfg = loop.cfg = shapes.iteration_config(kind, "full", None, "no")
    loop.timesteps = networks.ddim_scheduler(kind, 20).timesteps
    counts = {"unet": 0, "decode": 0, "text": 0}

    def predict(x, t, cond):
        counts["unet"] += 2 * len(x)
        return x

    def score(latents, t, ids):
        counts["decode"] += len(latents)
        counts["text"] += len(ids)

    loop.policy, loop._score = predict, score
    B = setup.cfg.sample.sample_batch_size
    cond = networks.conditioning(kind, "tiny", B, "cpu", torch.float32)
    decisions = iteration.Decisions.scripted(setup.cfg, 1.0, "cpu")
    pairs = loop.rollout(networks.token_ids(B, "cpu"), cond, shapes.TINY_LATENTS, decisions)
    assert counts == {"unet": forwards, "decode": decodes, "text": decodes}
    assert len(pairs["t"]) == 16 * B


# ---------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("kind", KINDS)
def test_ours_agrees_with_the_published_loop(kind, tmp_path):
    records = Records(tmp_path / "records.jsonl", kind, size="tiny")
    iteration.truth(tiny(kind, "fp64"), tmp_path, records)
    saved = torch.load(tmp_path / f"{kind}_truth.pt", weights_only=False)
    pairs, truth = saved["pairs"], saved["truth"]
    assert any(pairs.shared) and not all(pairs.shared)
    assert float(truth.log_ratios.abs().max()) > 1e-3  # else there is nothing to compare

    errors = iteration.make_contender(tiny(kind, "fp64"), technique("ours", "fp64")).evaluate(pairs).errors(truth)
    assert max(errors.values()) < 1e-9, errors

    published = iteration.make_contender(tiny(kind), technique("published")).evaluate(pairs)
    contender = iteration.make_contender(tiny(kind), technique("ours"))
    ours = contender.evaluate(pairs)
    errors = ours.errors(published)
    assert errors["loss_error"] < 1e-4 and errors["gradient_error"] < 1e-4
    assert float((ours.log_ratios - published.log_ratios).abs().max()) < 1e-4
    assert iteration.gate(ours.errors(truth), published.errors(truth), "no") == "passed"

    contender.objective = dataclasses.replace(contender.objective, beta=1.01 * contender.objective.beta)
    verdict = iteration.gate(contender.evaluate(pairs).errors(truth), published.errors(truth), "no")
    assert verdict.startswith("failed"), "the gate does not notice another beta"


def test_a_step_of_the_preference_models_training_is_the_published_one():
    """Published against ours, and either against the published one in float64: what is timed computes the same."""
    torch.set_num_threads(1)
    how = {"truth": "fp64", "published": "no", "float32": "no"}
    found = {}
    for name, frozen in how.items():
        contender = cpu_spm.CONTENDERS.get(name, cpu_spm.Contender(published=True, frozen=frozen))
        step = cpu_spm.make_step("tiny", contender, cpu_spm.Phases())
        found[name] = step.evaluate(cpu_spm.batch_of("tiny", 0))
    for name in ("published", "float32"):
        errors = found[name].errors(found["truth"])
        assert errors["loss_error"] < 1e-4 and errors["gradient_error"] < 1e-4, (name, errors)
    assert found["truth"].loss > 0.01


def test_reading_pairs_is_measured_on_equal_pictures():
    data = cpu_spm.photograph(96, 64, seed=1)
    assert 2000 < len(data) < 20_000
    found = [reader(data, 48) for reader in cpu_spm.READERS.values()]
    steps = (found[0] - found[1]).abs() * 127.5
    assert found[0].shape == (3, 48, 48) and found[0].std() > 0.1 and steps.max() < 2.5 and steps.mean() < 0.02


def test_gate_refuses_what_is_not_finite():
    assert iteration.gate({"loss_error": math.nan}, {"loss_error": 1.0}, "fp16").startswith("failed")


@pytest.mark.parametrize("kind", KINDS)
def test_an_iteration_of_each_contender(kind, tmp_path):
    """Both keep the scripted pairs; ours evaluates a shared x_t once; without `truth` the gate says so."""
    records = Records(tmp_path / "records.jsonl", kind, size="tiny")
    for row in ("published", "ours"):
        iteration.run_row(
            setup=tiny(kind, rollouts=True),
            row=row,
            technique=technique(row),
            scratch=tmp_path,
            records=records,
            deadline=lambda: 1000.0,
            valid_shares=(0.5,),
            repetitions=1,
        )
    by_name = {r["name"]: r for r in read(records.path)}
    published, ours = (by_name[f"{kind}/{row}/v=0.5"] for row in ("published", "ours"))
    cfg = shapes.iteration_config(kind, "tiny", None, "no")
    comparisons = iteration.Decisions.scripted(cfg, 0.5, "cpu").valid
    segment = 1 + cfg.sample.num_inner_steps
    assert published["pairs"] == ours["pairs"] == segment * round(0.5 * comparisons.numel())
    shared = ours["pairs"] // segment
    assert ours["states"] == 2 * ours["pairs"] - shared
    assert {"unet_ms", "decode_ms", "score_ms", "reference_ms", "backward_ms"} <= set(ours["phases_ms"])
    assert {"encode_ms", "unet_ms", "decode_ms", "score_ms", "reference_ms"} <= set(published["phases_ms"])
    assert ours["n"] == 1 and ours["gate"].startswith("not checked") and not ours["published_batch"]


@pytest.mark.slow
@pytest.mark.parametrize("row", ["ours+fuse", "ours+merged", "ours+bf16", "ours+compile"])
def test_every_technique_runs(row, tmp_path):
    records = Records(tmp_path / "records.jsonl", "sd15", size="tiny")
    iteration.truth(tiny("sd15"), tmp_path, records)
    for name, mixed_precision in (("published", "no"), (row, "bf16" if "bf16" in row else "no")):
        setup = tiny("sd15", mixed_precision, rollouts=True)
        iteration.run_row(
            setup=setup,
            row=name,
            technique=technique(name, mixed_precision),
            scratch=tmp_path,
            records=records,
            deadline=lambda: 1000.0,
            valid_shares=(1.0,),
            repetitions=1,
        )
    last = read(records.path)[-1]
    assert last["n"] == 1
    if mixed_precision == "no":
        assert last["gate"] == "passed"
    if "compile" in row:
        assert last["graphs_compiled"] > 0 and last["graphs_compiled_after_warmup"] == 0


def test_scripted_decisions_are_exact_and_seeded():
    cfg = shapes.iteration_config("sdxl", "full", None, "no")
    a, b = (iteration.Decisions.scripted(cfg, 0.5, "cpu") for _ in range(2))
    assert torch.equal(a.valid, b.valid) and torch.equal(a.ranks, b.ranks)
    assert int(a.valid.sum()) == 4 and a.valid.shape == (4, 2)
    from spo_fast.method.rollout import best_and_worst

    for c in range(4):
        sides, valid = best_and_worst(a.scores(c).view(2, 2), cfg.sample.threshold)
        assert torch.equal(valid, a.valid[c])
        kept = a.ranks[c].argmax(0)[valid]
        assert torch.equal(sides[0][valid], kept)


# ---------------------------------------------------------------------------------------------------- other stages


def test_guided_step_keeps_its_promises():
    facts = bench_graph.check_step("sdxl", "tiny", "cpu", torch.float32)
    assert facts["max_error"] == 0 and facts["bitwise_equal_to_eager"] and not facts["captured"]
    assert facts["same_keys_same_noise"] and facts["new_keys_new_noise"] and facts["x0_ignores_keys"]


def test_a_stale_replay_is_noticed():
    """A graph that ignores its refilled inputs must not pass."""
    step = bench_graph.GuidedStep("sd15", "tiny", "cpu", torch.float32)
    step.fill(0, 2, 10)
    old = step()
    facts = bench_graph.check_replays(step, lambda: old)
    assert facts["max_error"] > 0.1 and not facts["new_keys_new_noise"]


def test_libraries_leave_a_record_each(tmp_path):
    records = Records(tmp_path / "records.jsonl", "libraries", size="tiny")
    bench_libraries.run_ceilings(records, "tiny", "cpu")
    bench_libraries.run(records, "tiny", "cpu")
    rows = read(records.path)
    names = {r["name"] for r in rows} | {r.get("contender") for r in rows}
    assert {"copy", "matmul", *bench_libraries.OPTIMIZERS, *bench_libraries.ATTENTIONS} <= names
    assert all(r.get("reason") or r.get("error") for r in rows if r["status"] != "ok")
    gpu_run.summary(rows)


def test_relative_error_catches_what_was_never_written():
    x = torch.ones(3)
    assert relative_error(x, x) == 0
    assert relative_error(torch.tensor([1.0, math.nan, 1.0]), x) == math.inf
    assert relative_error((x, torch.tensor(2.0)), (x, torch.tensor(4.0))) == 0.5
    assert relative_error(torch.ones(2), x) == math.inf


# ---------------------------------------------------------------------------------------------------- the runner


def test_quantiles():
    assert quantiles([4.0, 1.0, 3.0, 2.0, 5.0, 6.0]) == pytest.approx({"p20_ms": 2, "p50_ms": 3.5, "p80_ms": 5, "n": 6})


def fake_job(context):
    """What a job may do, by its name."""
    if context.job == "breaks":
        raise RuntimeError("the kernel is wrong")
    if context.job == "dies":
        faulthandler.disable()  # the fork has pytest's, which would write a page into the tests' log
        os.abort()
    if context.job == "hangs":
        print("started")
        subprocess.Popen(["sleep", "600"])
        time.sleep(600)
    print("fine", os.getpid() == os.getpgid(0))


FAKE_JOBS = ("breaks", "dies", "hangs", "works", "no time")


def test_whatever_fails_leaves_a_record_and_the_next_runs(tmp_path, monkeypatch, capsys):
    jobs = {name: gpu_run.Job(fake_job, 3 if name == "hangs" else 60, 0, f"what {name} gives") for name in FAKE_JOBS}
    jobs["no time"] = gpu_run.Job(fake_job, 60, 10_000)
    monkeypatch.setattr(gpu_run, "STAGES", {name: {name: job} for name, job in jobs.items()})
    gpu_run.main(["--out", str(tmp_path / "out"), "--budget_s", "1000", "--device", "cpu"])
    rows = {r["name"].removeprefix("job "): r for r in read(tmp_path / "out" / "records.jsonl")}
    status = {name: rows[name]["status"] for name in FAKE_JOBS}
    assert status == {"breaks": "failed", "dies": "failed", "hangs": "timeout", "works": "ok", "no time": "skipped"}
    assert "the kernel is wrong" in rows["breaks"]["error"]
    assert "started" in rows["hangs"]["error"] and 3 <= rows["hangs"]["wall_s"] < 60
    assert "needs 10000" in rows["no time"]["reason"]
    assert rows["works"]["versions"]["torch"] and rows["works"]["command"]
    assert "fine True" in (tmp_path / "out" / "log.txt").read_text()  # a process group of its own
    printed = capsys.readouterr().out
    assert "the kernel is wrong" in printed and "timeout" in printed and "skipped" in printed
    lines = printed[printed.index("lost if the call ends before") :].splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["1", "2", "3", "4", "5"] and "what hangs gives" in lines[2]


def test_a_stage_that_raises_records_the_error(tmp_path, monkeypatch):
    def broken(context):
        context.records.write("first measurement", p50_ms=1.0)
        raise ImportError("no module named bitsandbytes")

    monkeypatch.setattr(gpu_run, "STAGES", {"broken": {"broken": gpu_run.Job(broken, 10, 1)}})
    gpu_run.main(["--out", str(tmp_path), "--device", "cpu"])
    _, first, second, job = read(tmp_path / "records.jsonl")
    assert first["status"] == "ok" and first["p50_ms"] == 1.0
    assert second["status"] == "failed" and "bitsandbytes" in second["error"]
    assert job["status"] == "failed" and job["returncode"] == 1


def test_the_second_call_begins_with_what_the_first_did_not_end(tmp_path):
    """--done: a row that failed comes first, with `truth` again since it makes a file; what was spare stays so."""
    first, second = (gpu_run.CALLS[n] for n in (1, 2))

    def names(*argv):
        return list(gpu_run.planned(gpu_run.parse(["--out", str(tmp_path), *argv])))

    def done(failed):
        path = tmp_path / f"{len(failed)}.jsonl"
        for name in first.jobs:
            Records(path, "run").write(f"job {name}", "failed" if name in failed else "ok")
        return str(path)

    assert names("--call", "1") == [*first.jobs, *first.spare]
    assert names("--call", "2") == [*second.jobs, *second.spare]
    assert names("--call", "2", "--done", done(())) == [*second.jobs, *second.spare]
    planned = names("--call", "2", "--done", done(("sdxl/ours", "ops/short")))
    assert planned[:4] == ["sdxl/truth", "sdxl/ours", "ops/short", "sd15/truth"]
    assert set(planned) == {*second.jobs, *second.spare, "sdxl/ours", "ops/short"}
    assert names("--call", "1", "--only", "sdxl", "tests") == [
        n for n in (*first.jobs, *first.spare) if n == "tests" or n.startswith("sdxl/")
    ]
    with pytest.raises(SystemExit):
        gpu_run.parse(["--out", str(tmp_path), "--call", "2", "--done", str(tmp_path / "none.jsonl")])


def test_calls_have_every_row_that_the_tables_need():
    jobs = [name for call in gpu_run.CALLS.values() for name in (*call.jobs, *call.spare)]
    gpu_run.chosen(jobs)  # every one is a job
    for kind in KINDS:
        rows = {name for name in jobs if name.startswith(f"{kind}/")}
        assert {f"{kind}/{row}" for row in ("truth", "published", "modern", "ours", "ours+all")} <= rows
        # a row's gate needs them before it
        for call in gpu_run.CALLS.values():
            mine = [name for name in (*call.jobs, *call.spare) if name.startswith(f"{kind}/")]
            assert not mine or mine[0] == f"{kind}/truth"
        assert f"hours/{kind}-spo" in jobs


def test_a_call_measures_one_share(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(gpu_run, "STAGES", {"sdxl": {"sdxl/ours": gpu_run.Job(seen.append, 9, 1)}})
    args = gpu_run.parse(["--out", str(tmp_path), "--device", "cpu"])
    for call in (None, 1):
        args.call = call
        gpu_run.run_here(args, "sdxl/ours", gpu_run.STAGES["sdxl"]["sdxl/ours"], 9.0, tmp_path)
    assert [(c.valid_shares, c.repetitions) for c in seen] == [((0.5, 1.0), 5), ((0.5,), 3)]


def test_published_errors_of_an_earlier_call_judge_the_rows(tmp_path, monkeypatch):
    done, found = Records(tmp_path / "records.jsonl", "sdxl"), tmp_path / "found"
    done.write("sdxl/published/parity", loss_error=0.25)
    job = gpu_run.Job(lambda c: found.write_text((c.scratch / "sdxl_published.json").read_text()), 60, 0)
    monkeypatch.setattr(gpu_run, "STAGES", {"sdxl": {"sdxl/ours": job}})
    gpu_run.main(["--out", str(tmp_path / "out"), "--device", "cpu", "--done", str(done.path)])
    assert json.loads(found.read_text())["loss_error"] == 0.25
    assert iteration.gate({"loss_error": 0.6}, json.loads(found.read_text()), "fp16").startswith("failed")


def test_libraries_are_imported_without_a_device(tmp_path):
    """What has been asked of the CUDA driver dies in a fork, and with a thread a fork may hang."""
    program = """
import os, sys, torch
asked = []
def trap(name):
    return lambda *_: asked.append(name) or 0
for module, name in ((torch.cuda, "is_available"), (torch.cuda, "_lazy_init"), (torch._C, "_cuda_getDeviceCount")):
    if hasattr(module, name):
        setattr(module, name, trap(name))
from benchmarks import gpu_run
gpu_run.STAGES = {"x": {"x": gpu_run.Job(lambda c: print("fine"), 60, 0)}}
gpu_run.main(["--out", sys.argv[1], "--device", "cuda"])
assert {"benchmarks.gpu_hours", "torch._dynamo", "transformers"} <= set(sys.modules)
print(asked, len(os.listdir("/proc/self/task")), "bitsandbytes" in sys.modules)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.splitlines()[-1] == "[] 1 False"


def test_a_process_that_has_used_the_device_forks_no_jobs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    with pytest.raises(RuntimeError, match="run gpu_run.py as a command"):
        gpu_run.import_libraries("cpu")


def test_records_name_no_place_of_this_machine():
    assert command(["/usr/bin/python3", "-m", "pytest", "-q", "benchmarks/"]) == "python -m pytest -q benchmarks/"
    assert command(["/usr/bin/python3", "/opt/bin/pytest", "benchmarks/"]) == "pytest benchmarks/"
    assert command(["python", "benchmarks/gpu_run.py", "--only", "a b"]) == "python benchmarks/gpu_run.py --only 'a b'"


def test_the_command_itself(tmp_path):
    """One real job in its own process, and one that the budget does not reach."""
    script = [sys.executable, str(Path(gpu_run.__file__)), "--out", str(tmp_path), "--size", "tiny", "--device", "cpu"]
    subprocess.run([*script, "--only", "ceilings", "--budget_s", "900"], check=True, capture_output=True)
    rows = read(tmp_path / "records.jsonl")
    assert {"copy", "matmul", "job ceilings"} <= {r["name"] for r in rows if r["status"] == "ok"}
    assert "==== ceilings" in (tmp_path / "log.txt").read_text()
    assert "gpu_run.py" in rows[-1]["command"] and rows[-1]["cpu_s"] > 0
    subprocess.run([*script, "--only", "ops", "--budget_s", "0"], check=True, capture_output=True)
    assert read(tmp_path / "records.jsonl")[-1]["status"] == "skipped"


def test_unknown_stage_is_named():
    with pytest.raises(SystemExit, match="unknown. Stages: tests"):
        gpu_run.chosen(["opps"])
    assert list(gpu_run.chosen(["sdxl/ours", "graph"])) == ["graph", "sdxl/ours"]
    assert "ops_autotuned" not in gpu_run.chosen([])


def test_layer_shapes_are_those_of_the_networks():
    for kind, norms, transformer_blocks in (("sd15", 61, 16), ("sdxl", 46, 70)):
        layers = shapes.unet_layers(kind)
        assert sum(s.calls for s in layers if s.groups == 32) == norms
        assert sum(s.calls for s in layers if not s.groups) == transformer_blocks
    largest = shapes.layer_shapes("group_norm_silu", "full")[-1]
    assert largest.x == (1, 256, 1024, 1024) and largest.silu and largest.calls == 1


def test_a_torn_line_is_left_out(tmp_path):
    path = Path(tmp_path / "records.jsonl")
    Records(path, "x").write("whole")
    path.write_text(path.read_text() + json.dumps({"name": "torn"})[:7])
    assert [r["name"] for r in read(path)] == ["whole"]


def test_the_table_of_a_cpu(tmp_path, monkeypatch):
    """Tiny: a record a contender, ratios to our own choice, a line a case; every case of the real table can be made."""
    from benchmarks import cpu_ops, timing
    from benchmarks.bench_transition import transition_case

    monkeypatch.setattr(timing, "TURN_MS", 0)
    records = Records(tmp_path / "records.jsonl", "cpu ops")
    case = transition_case(shapes.StepShape("x", 2, 2, (4, 8, 8)), torch.float32, "cpu", (), supplied=True)
    timing.compare_on_cpu(case, records, turns=3)
    rows = {r["contender"]: r for r in read(records.path)}
    assert set(rows) == set(case.contenders) >= {"eager", "ours"}
    assert rows["ours"]["to_ours"] == [1, 1, 1] and rows["ours"]["chosen"] in rows and rows["ours"]["n"] == 3
    assert all(r["max_error"] < 1e-6 and 0 < r["to_ours"][0] <= r["to_ours"][2] for r in rows.values())
    heading, line = cpu_ops.summary([*rows.values()]).splitlines()
    assert heading.startswith("op ") and "eager / ours" in heading
    assert line.startswith("transition x") and rows["ours"]["chosen"] in line.split()
    assert len({(case.name, case.dtype) for case in cpu_ops.cases()}) == len(cpu_ops.cases()) > 30


def test_cpu_iterations_take_turns_and_are_judged_in_their_own_type(tmp_path, monkeypatch):
    """Two contenders of each type at the tiny size: ratios are to the first, and every record says how exact it is."""
    from benchmarks import cpu_iteration

    forks = multiprocessing.get_context("forkserver")  # its five processes import PyTorch once, not each
    forks.set_forkserver_preload(["benchmarks.cpu_iteration"])
    monkeypatch.setattr(multiprocessing, "get_context", lambda how: forks)
    names = ["published", "published bf16", "float32", "bf16"]
    path = tmp_path / "records.jsonl"
    found = cpu_iteration.run(path, "tiny", names, (1.0,), turns=1)
    assert [r["name"] for r in found] == [f"tiny/{name}/v=1" for name in names]
    assert {r["gate"] for r in found} == {"passed"}
    first, *others = found
    assert {v for part in first["ratios"].values() for v in part.values()} == {1.0}
    for r in others:
        assert r["ratio_to"] == "published" and r["pairs"] == first["pairs"] > 0
        assert r["ratios"]["iteration"]["median"] == pytest.approx(first["cpu_s"]["median"] / r["cpu_s"]["median"])
        assert {"rollout", "reference", "backward", "peak memory"} <= r["ratios"].keys()
        assert r["peak_mib"] > 100 and set(r["phases_s"]) >= {"rollout", "reference", "backward"}
    assert found[1]["log_ratio_error"] > 10 * found[0]["log_ratio_error"]  # of bf16
    lines = cpu_iteration.summary(read(path)).splitlines()
    assert len(lines) == 5 and lines[1].split()[:2] == ["tiny/published/v=1", f"{first['cpu_s']['median']:.4g}"]


def test_a_contender_that_dies_is_named(tmp_path):
    from benchmarks import cpu_iteration

    with pytest.raises(RuntimeError, match="process of float32 ended with 1"):
        cpu_iteration.Worker("float32", False, cpu_iteration.serve, "no such size", tmp_path, tmp_path / "x.jsonl")


def test_ratios_are_of_one_turn():
    from benchmarks.cpu_iteration import ratios

    def turn(seconds, rollout, peak):
        return {"cpu_s": seconds, "phases_s": {"rollout": rollout, "mine": 1.0}, "peak_mib": peak}

    theirs = [turn(8.0, 4.0, 300.0), turn(30.0, 9.0, 300.0), turn(9.0, 5.0, 300.0)]
    for r in theirs:
        del r["phases_s"]["mine"]
    mine = [turn(4.0, 1.0, 100.0), turn(10.0, 9.0, 150.0), turn(3.0, 5.0, 100.0)]
    assert ratios(mine, theirs) == {
        "iteration": {"min": 2.0, "median": 3.0, "max": 3.0},
        "rollout": {"min": 1.0, "median": 1.0, "max": 4.0},
        "peak memory": {"min": 2.0, "median": 3.0, "max": 3.0},
    }
