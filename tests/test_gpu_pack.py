"""What travels to a GPU that is lent for minutes, and what a rehearsal says of the calls."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile

import pytest

from benchmarks import gpu_hours, gpu_pack, gpu_rehearsal, gpu_run
from benchmarks.shapes import KINDS


def files(archive):
    with tarfile.open(archive) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar.getmembers()}


def test_binaries_and_graphs_travel_and_no_choice_that_was_timed_on_nothing(tmp_path):
    cache = tmp_path / "cache"
    written = {
        "triton/KEY/kernel.cubin": b"binary",
        "triton/KEY/kernel.json": b"{}",
        "triton/KEY/__grp__kernel.json": b'{"child_paths": {"kernel.cubin": "/elsewhere/triton/KEY/kernel.cubin"}}',
        "triton/KEY/kernel.ptx": b"text",
        "triton/KEY/kernel.ttir": b"text",
        "triton/KEY/kernel.source": b"text",
        "triton/OTHER/kernel.json.tmp.pid_1": b"half",
        "inductor/fxgraph/ab/KEY/graph": b"graph",
        "inductor/aotautograd/KEY/entry": b"entry",
        "inductor/ab/cab.py": b"code",  # written again from the graph
        "inductor/ab/cab.best_config": b"{}",
        "inductor/fxgraph/ab/KEY/graph.best_config": b"{}",
    }
    for name, content in written.items():
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_bytes(content)
    assert gpu_pack.pack_cache(cache, tmp_path / "cache.tar.xz") == 1
    assert files(tmp_path / "cache.tar.xz") == {
        "triton/KEY/kernel.cubin": b"binary",
        "triton/KEY/kernel.json": b"{}",
        "triton/KEY/__grp__kernel.json": b'{"child_paths": {"kernel.cubin": "%s/triton/KEY/kernel.cubin"}}'
        % str(gpu_pack.UNPACKED).encode(),
        "triton/KEY/kernel.ptx": b"",  # Triton wants it there
        "triton/KEY/kernel.ttir": b"",
        "triton/KEY/kernel.source": b"",
        "inductor/fxgraph/ab/KEY/graph": b"graph",
        "inductor/aotautograd/KEY/entry": b"entry",
    }
    assert gpu_run.compiled_files(cache) == {"kernels": 1, "graphs": 2}
    assert gpu_run.compiled_files(None) == {}


def test_too_much_is_said(tmp_path, monkeypatch, capsys):
    pack = tmp_path / ".gpu"
    monkeypatch.setattr(gpu_pack, "PACK", pack)
    monkeypatch.setattr(gpu_pack, "download", lambda wheels, folder: (folder / wheels[0]).write_bytes(b"x" * 1000))
    monkeypatch.setattr(gpu_pack, "travelling_bytes", lambda: sum(f.stat().st_size for f in pack.iterdir()))
    gpu_pack.main(["--wheels", "small.whl"])
    assert "small.whl" in capsys.readouterr().out
    monkeypatch.setattr(gpu_pack, "LIMIT_BYTES", 999)
    with pytest.raises(SystemExit, match="leave a wheel out"):
        gpu_pack.main(["--wheels", "large.whl"])
    assert [f.name for f in pack.iterdir()] == ["large.whl"]  # what an earlier pack held is gone


def test_a_triton_kernel_comes_out_of_an_unpacked_cache(tmp_path, monkeypatch):
    """Compiled ahead of time for sm_90, packed with the steps in between emptied, unpacked under another name."""
    pytest.importorskip("triton")
    program = (
        "import sys; from benchmarks.aot import KERNELS, compile_for; from pathlib import Path\n"
        "compiled = compile_for(*KERNELS['preference_loss, pairs'], 90, '*fp32')\n"
        "print(len(compiled.asm['cubin']), len(compiled.asm['ptx']))"
    )

    def compile_in(folder):
        environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / "triton"), "TRITON_INTERPRET": "0"}
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=gpu_run.ROOT, env=environment)
        return [int(word) for word in done.stdout.split()]

    monkeypatch.setattr(gpu_pack, "UNPACKED", tmp_path / "there")
    binary, ptx = compile_in(tmp_path / "here")
    assert binary > 0 and ptx > 0
    gpu_pack.pack_cache(tmp_path / "here", tmp_path / "cache.tar.xz")
    with tarfile.open(tmp_path / "cache.tar.xz") as tar:
        tar.extractall(tmp_path / "there", filter="data")
    shutil.rmtree(tmp_path / "here")  # to which the paths in its entries had led
    before = sorted((tmp_path / "there").rglob("*"))
    assert compile_in(tmp_path / "there") == [binary, 0]  # the ptx is the emptied one: nothing was compiled again
    assert sorted((tmp_path / "there").rglob("*")) == before


@pytest.mark.parametrize("kind", KINDS)
def test_estimates_by_hand(kind, monkeypatch):
    """Every call costs 1 TFLOP here, so a row's estimate is a count of calls."""
    monkeypatch.setattr(gpu_hours, "call_costs", lambda kind: dict.fromkeys(CALLS, 10**12))
    parity = 16 + 16 + 16
    s = gpu_hours.published_config(kind, "spo").sample
    B, K, steps = s.sample_batch_size, s.num_candidates, s.num_steps
    branched = steps - s.branch_start
    images = K * B * (branched // (1 + s.num_inner_steps))
    rollout = 2 * B * (s.branch_start + 1 + K * (branched - 1)) + 3 * images + B
    pairs = branched * B // 2
    published = {"name": f"{kind}/published/v=0.5", "n": 3, "pairs": pairs}
    seconds = gpu_rehearsal.device_seconds(f"{kind}/published", [published])
    assert seconds == pytest.approx((parity + 4 * (rollout + 12 * pairs)) / gpu_rehearsal.COMPUTE_TFLOPS["eager"])
    # graphs are recorded at the second call: a warm-up more; every x_t shared: half of the rows
    ours = {"name": f"{kind}/ours+all/v=0.5", "n": 3, "pairs": pairs, "states": pairs}
    seconds = gpu_rehearsal.device_seconds(f"{kind}/ours+all", [ours])
    assert seconds == pytest.approx((parity + 5 * (rollout + 6 * pairs)) / gpu_rehearsal.COMPUTE_TFLOPS["compiled"])
    steps = {"name": f"{kind}/dpo micro-batch of 4", "n": 3, "pairs": 4, "p50_step_ms": 1.0}
    seconds = gpu_rehearsal.device_seconds(f"hours/{kind}-dpo", [steps])
    assert seconds == pytest.approx(2 * 4 * 4 / gpu_rehearsal.COMPUTE_TFLOPS["eager"])


CALLS = (
    *("unet", "unet with LoRA", "backward to LoRA", "prompt", "decode", "score", "score text", "latent score"),
    *("latent score text", "dpo", "spm", "lrm"),
)


def test_the_table_adds_up_and_names_what_compiled_again():
    records = [
        {"name": "copy", "status": "ok", "p50_ms": 1.0},
        {"name": "job ceilings", "status": "ok", "cpu_s": 2.0, "compiled": {"kernels": 0, "graphs": 0}},
        {"name": "geglu", "status": "ok", "p50_ms": 1.0},
        {"name": "geglu", "status": "skipped", "reason": "none"},
        {"name": "job ops/short", "status": "ok", "cpu_s": 3.0, "compiled": {"kernels": 4, "graphs": 0}},
    ]
    _, tests, ceilings, ops = gpu_rehearsal.compare(1, records).splitlines()
    assert "assumed" in tests and "nothing" in ceilings and "4 kernels" in ops
    assert ceilings.split()[-1] == f"{gpu_rehearsal.TESTS_S + 2 + gpu_rehearsal.TIMED_S:.0f}"
    assert ops.split()[-1] == f"{gpu_rehearsal.TESTS_S + 5 + 2 * gpu_rehearsal.TIMED_S:.0f}"
