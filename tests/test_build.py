"""The build, the packaging, and what only the C library has: Philox words, threads, error codes, its binding."""

from __future__ import annotations

import ast
import ctypes
import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from spo_fast.ops import c_library, geglu, group_norm_silu, log_ratio, merge_lora, philox, resize_normalize, transition

ROOT = Path(__file__).parents[1]
NVCC = shutil.which("nvcc")
HEAVY = {"torch", "diffusers", "transformers"}

needs_library = pytest.mark.skipif(c_library.load("cpu") is None, reason=c_library.why_missing("cpu"))


def in_subprocess(code: str, python: str = sys.executable, **environment: str) -> str:
    """What `code` prints in a fresh interpreter that stands outside the repository."""
    result = subprocess.run(
        [python, "-c", code], cwd="/", env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_is_light():
    code = f"import sys, spo_fast; print(sorted({HEAVY!r} & set(sys.modules)), spo_fast.__version__)"
    assert in_subprocess(code, PYTHONPATH=str(ROOT)).split() == ["[]", "0.1.0"]


def test_ops_are_there_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import torch; from spo_fast.ops import __main__, geglu; "
        "print([row[3] for row in __main__.table(('cpu',)) if row[2] == 'triton' and row[0] != 'linear']); "
        "print(float(geglu.geglu(torch.tensor([2.0, 1.0])))); print(torch.ops.spo_fast.transition_c)"
    )
    reasons, value, op = in_subprocess(code, PYTHONPATH=str(ROOT)).splitlines()
    assert set(ast.literal_eval(reasons)) == {"the package triton is not installed"}
    assert float(value) == pytest.approx(2 * 0.8413447, rel=1e-6) and op == "spo_fast.transition_c"


CUDA_KERNELS = {  # source: kernels in it, one a combination of types
    "transition": 3 * 4 * 2,  # three, for four types of network outputs and two of latents
    "merge": 3,  # one, for three types of weights
    "resize_normalize": 4 * 4,  # one, for the types of pixels and of outputs
}


@pytest.mark.skipif(NVCC is None, reason="needs nvcc on PATH")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("source", CUDA_KERNELS)
def test_cuda_compiles_without_warnings_or_spills(source, architecture, tmp_path):
    assert {path.stem for path in (ROOT / "csrc").glob("*.cu")} == set(CUDA_KERNELS)
    command = [NVCC, "-std=c++17", "-O3", f"-arch={architecture}", "-Xcompiler=-Wall,-Wextra,-Werror"]
    command += ["--Werror=all-warnings", "-Xptxas=-v", "-c", str(ROOT / f"csrc/{source}.cu"), "-o", "kernels.o"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    report = result.stdout + result.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(spills) == CUDA_KERNELS[source]
    assert set(spills) == {("0", "0")}


@pytest.mark.skipif(c_library.load("cuda") is None, reason=c_library.why_missing("cuda"))
def test_cuda_errors_carry_their_text(monkeypatch):
    library = c_library.load("cuda")
    assert library.spo_error_string(1000 + 2).decode() == "out of memory"  # cudaErrorMemoryAllocation
    if torch.cuda.is_available():
        return
    # without a device every launch fails: through the binding, as if these tensors were on one
    monkeypatch.setattr(c_library, "load", lambda device_type: library)
    m, row = torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)
    table = torch.ones(1, 5, dtype=torch.float64)
    for call in (
        lambda: transition.transition_c(m, None, m, row, table, 1.0, 0, None, None),
        lambda: log_ratio.log_ratio_forward(m, None, m, None, m, m, row, row, table, 1.0),
        lambda: log_ratio.log_ratio_backward(
            m, None, m, None, m, m, row, row, table, 1.0, torch.ones(1), torch.ones(1)
        ),
        lambda: resize_normalize.resize_normalize_c(torch.zeros(1, 3, 4, 4), 2, [0.0] * 3, [1.0] * 3, torch.float32),
    ):
        with pytest.raises(RuntimeError, match="failed: .*(CUDA|driver|device)"):
            call()


def c_array(values):
    return (ctypes.c_uint32 * len(values))(*values)


# Known answers published with Random123 (kat_vectors, philox4x32 with 10 rounds).
@needs_library
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    out = c_array([0] * 4)
    assert c_library.load("cpu").spo_philox(c_array(counter), c_array(key), out) == 0
    assert " ".join(f"{word:08x}" for word in out) == expected


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def log_ratio_inputs(num_states=3, num_transitions=5, sample=(4, 65, 64)):
    m = [randn(num_states, *sample, seed=i) for i in range(4)]
    x_t, x_prev = randn(num_states, *sample, seed=4), randn(num_transitions, *sample, seed=5)
    states, rows = torch.arange(num_transitions) % num_states, torch.arange(num_states) % 2
    table = torch.tensor([[0.9, 0.1, 1.1, -0.5, 0.3], [0.8, 0.2, 1.2, -0.6, 0.02]], dtype=torch.float64)
    return [*m, x_t, x_prev, states, rows, table, 5.0]


HEADER = (ROOT / "csrc/spo_fast.h").read_text()
CPU_ONLY = {"spo_group_norm_silu_forward", "spo_group_norm_silu_backward", "spo_geglu_forward", "spo_geglu_backward"}


@needs_library
def test_libraries_export_the_interface_and_nothing_else():
    declared = set(re.findall(r"^SPO_API .*?(spo_\w+)\(", HEADER, re.MULTILINE))
    called = re.findall(r'call\("(spo_\w+)"', "".join(p.read_text() for p in (ROOT / "spo_fast/ops").glob("*.py")))
    others = {"spo_abi_version", "spo_error_string", "spo_set_num_threads", "spo_set_isa", "spo_philox"}
    assert len(called) == len(set(called)) and {*called, *others} == declared
    for library in filter(None, map(c_library.load, c_library.LIBRARIES)):
        listing = subprocess.run(
            ["nm", "-D", "--defined-only", library._name], capture_output=True, text=True, check=True
        )
        absent = CPU_ONLY if "cuda" in library._name else set()
        assert {line.split()[2] for line in listing.stdout.splitlines()} == declared - absent


MIRRORS = {
    "spo_transition_args": transition.TransitionArguments,
    "spo_log_ratio_args": log_ratio.LogRatioArguments,
    "spo_resize_normalize_args": resize_normalize.ResizeNormalizeArguments,
    "spo_merge_args": merge_lora.MergeArguments,
    "spo_group_norm_silu_args": group_norm_silu.GroupNormSiluArguments,
    "spo_geglu_args": geglu.GegluArguments,
}


def fields_of(mirror):
    """(name, type) of every field, those of the classes it builds on first."""
    return [field for base in reversed(mirror.__mro__) for field in base.__dict__.get("_fields_", ())]


@pytest.mark.parametrize("struct", MIRRORS)
def test_structs_are_mirrored(struct, tmp_path):
    """Names, kinds, offsets and sizes, as a C compiler lays the header's structs out."""
    bodies = dict(reversed(pair) for pair in re.findall(r"typedef struct \{\n(.*?)\} (\w+);", HEADER, re.DOTALL))
    assert set(bodies) == {*MIRRORS, "spo_step"}
    body = bodies[struct].replace("  spo_step step;", bodies["spo_step"])
    declared = re.findall(r"^  (const \w+ \*|\w+ \*|\w+ )(\w+)(\[\d\])?;", body, re.MULTILINE)
    kinds = {"int64_t ": ctypes.c_int64, "double ": ctypes.c_double}
    fields = fields_of(MIRRORS[struct])
    assert [name for name, _ in fields] == [name for _, name, _ in declared]
    for (name, kind), (c_type, _, count) in zip(fields, declared, strict=True):
        assert getattr(kind, "_type_", kind) in (kinds.get(c_type), getattr(kinds.get(c_type), "_type_", None)) or (
            kind is ctypes.c_void_p and c_type.endswith("*")
        ), name
        assert getattr(kind, "_length_", None) == (int(count[1:-1]) if count else None), name
    step = {name for _, name, _ in re.findall(r"^  (.*?)(\w+)(\[\d\])?;", bodies["spo_step"], re.MULTILINE)}
    inside = [f"step.{name}" if "spo_step step" in bodies[struct] and name in step else name for name, _ in fields]
    offsets = "".join(f'printf("%zu ", offsetof({struct}, {name}));' for name in inside)
    (tmp_path / "layout.c").write_text(
        f'#include <stddef.h>\n#include <stdio.h>\n#include "spo_fast.h"\n'
        f'int main(void) {{ {offsets} printf("%zu", sizeof({struct})); }}\n'
    )
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        pytest.skip("needs a C compiler on PATH")
    subprocess.run([compiler, "-I", str(ROOT / "csrc"), "layout.c", "-o", "layout"], cwd=tmp_path, check=True)
    printed = subprocess.run([tmp_path / "layout"], capture_output=True, text=True, check=True).stdout
    mirror = MIRRORS[struct]
    assert [*map(int, printed.split())] == [
        *(getattr(mirror, name).offset for name, _ in fields),
        ctypes.sizeof(mirror),
    ]


@needs_library
def test_library_of_other_sources_is_refused(monkeypatch):
    """A struct that has grown since the library was built, and an interface of another version."""

    class Grown(merge_lora.MergeArguments):
        _fields_ = [("added", ctypes.c_int64)]

    w = torch.zeros(4)
    for name, other in (("spo_merge", Grown), ("spo_group_norm_silu_forward", merge_lora.MergeArguments)):
        with pytest.raises(RuntimeError, match=f"{name} on cpu failed: .*other sources.*pip install -e .") as error:
            c_library.call(name, w.device, other(dtype=w.dtype, weight=w, delta=w, n=4, out=w))
        assert "\n" not in str(error.value) and len(str(error.value)) < 300
    monkeypatch.setattr(c_library, "ABI_VERSION", c_library.ABI_VERSION + 1)
    c_library._open.cache_clear()
    try:
        assert c_library.load("cpu") is None
        version = f"has interface version {c_library.ABI_VERSION - 1}, this Python code needs {c_library.ABI_VERSION}"
        assert re.search(rf"{version}: run `pip install -e \.` again$", c_library.why_missing("cpu"))
    finally:
        monkeypatch.undo()
        c_library._open.cache_clear()


def every_op(inputs):
    """Outputs of the ops that both C libraries have."""
    cond, uncond, x_t, rows, table = (inputs[i] for i in (0, 1, 4, 7, 8))
    weight, delta, out = randn(5000, dtype=torch.bfloat16), randn(5000, seed=1), torch.zeros(5000, dtype=torch.bfloat16)
    merge_lora.merge_c(weight, delta, torch.arange(5), out)
    return [
        *transition.transition_c(cond, uncond, x_t, rows, table, 5.0, 3, torch.arange(15).view(3, 5), None),
        *log_ratio.log_ratio_forward(*inputs),
        *log_ratio.log_ratio_backward(*inputs, randn(5), randn(5, seed=1)),
        resize_normalize.resize_normalize_c(randn(2, 3, 40, 31), 24, [0.5] * 3, [0.2] * 3, torch.float32),
        out,
    ]


@needs_library
def test_threads_never_show_in_the_result():
    inputs = log_ratio_inputs(sample=(4, 128, 65))
    before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2, 7):
            torch.set_num_threads(num_threads)
            results.append(every_op(inputs))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


ISA_BEST, ISA_PLAIN, ISA_AVX512, ERROR_ISA = 0, 1, 3, 8  # of csrc/spo_fast.h


@pytest.fixture
def instruction_sets() -> Iterator[Iterator[int]]:
    """Each one of this processor in turn, in use while it is looked at; the plain one first."""
    library = c_library.load("cpu")
    yield (code for code in range(ISA_PLAIN, ISA_AVX512 + 1) if library.spo_set_isa(code) == 0)
    assert library.spo_set_isa(ISA_BEST) == 0


@needs_library
def test_an_unknown_instruction_set_is_refused():
    library = c_library.load("cpu")
    assert {library.spo_set_isa(code) for code in (-1, ISA_AVX512 + 1)} == {ERROR_ISA}
    assert "instruction set" in library.spo_error_string(ERROR_ISA).decode()


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_instruction_sets_never_show_in_the_result(dtype, instruction_sets):
    """Bit for bit, with sizes that are multiples of no vector; tests/test_<op>.py hold the best against float64."""
    latents = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = log_ratio_inputs(sample=(3, 33, 31))
    inputs[:6] = [*(m.to(dtype) for m in inputs[:4]), *(x.to(latents) for x in inputs[4:6])]
    x, grad = randn(2, 30, 19, 7, dtype=dtype), randn(2, 30, 19, 7, dtype=dtype, seed=1)
    weight, bias = randn(30, dtype=dtype), randn(30, dtype=dtype, seed=1)
    noise = randn(3, *inputs[4].shape, dtype=latents, seed=6)
    merged = torch.bfloat16 if dtype == torch.float64 else dtype

    def results():
        cond, uncond, x_t, rows, table = (inputs[i] for i in (0, 1, 4, 7, 8))
        out, delta = torch.zeros(4999, dtype=merged), randn(4999, seed=1)
        merge_lora.merge_c(randn(4999, dtype=merged), delta, torch.arange(5), out)
        found = [out]
        for draws in ((torch.arange(15).view(3, 5), None), (None, noise)):
            found += transition.transition_c(cond, uncond, x_t, rows, table, 5.0, 3, *draws)
        found += log_ratio.log_ratio_forward(*inputs)
        found += log_ratio.log_ratio_backward(*inputs, randn(5, dtype=latents), randn(5, dtype=latents, seed=1))
        for layout in (torch.contiguous_format, torch.channels_last):
            pixels = randn(2, 3, 41, 37, dtype=dtype).contiguous(memory_format=layout)
            found.append(resize_normalize.resize_normalize_c(pixels, 24, [0.5] * 3, [0.2] * 3, dtype))
            last = layout == torch.channels_last
            x_, grad_ = (v.contiguous(memory_format=layout) for v in (x, grad))
            y, mean, rstd = group_norm_silu._forward_c(x_, weight, bias, 6, 1e-5, True, last)
            found += y, group_norm_silu._backward_c(x_, weight, bias, mean, rstd, grad_, 6, True, last)
        h, gate_bias, grad_y = (5 * randn(*shape, dtype=dtype) for shape in ((7, 11, 598), (598,), (7, 11, 299)))
        found += geglu._forward_c(h, gate_bias), geglu._backward_c(h, gate_bias, grad_y)
        return found

    plain, *others = [results() for _ in instruction_sets]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


@needs_library
def test_normals_are_those_of_their_words_in_float64(instruction_sets):
    """Box-Muller of the words, in float64 from the float32 uniforms: four roundings off at most, near zero too."""
    keys, zeros, n = torch.tensor([[7, 0, 2**31, 5, 2**32 - 1]]), torch.zeros(1, 2**20), 2**20
    w0, w1, w2, w3 = philox.words(keys, n // 4)
    parts = []
    for a, b in ((w0, w1), (w2, w3)):
        u, v = (w.float() * 2.0**-32 + 2.0**-33 for w in (a, b))
        radius = (-2 * u.double().log()).sqrt()
        theta = (v * torch.tensor(2 * torch.pi, dtype=torch.float32)).double()
        parts += [radius * theta.cos(), radius * theta.sin()]
    truth = torch.cat(parts, 1)
    table, row = torch.tensor([[1, 0, 1, 0, 1]], dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    for _ in instruction_sets:
        z = transition.transition_c(zeros, None, zeros, row, table, 1.0, 1, keys, None)[1][0]
        # rounded: log, halved by the root; the root; cosine or sine; their product
        assert ((z.double() - truth) / truth).abs().max() < 3.5 * 2**-24 * 1.01


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_conversions_agree_with_torch(dtype):
    """Every 16-bit pattern widens exactly; floats narrow to nearest even, also subnormals, ties, overflow and NaN."""
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).unsqueeze(0)
    zeros = torch.zeros_like(patterns, dtype=torch.float32)
    table = torch.tensor([[0, 1, 0, 1, 1]], dtype=torch.float64)  # x0 = m
    row = torch.zeros(1, dtype=torch.int64)
    widened, _ = transition.transition_c(patterns, None, zeros, row, table, 1.0, 0, None, None)
    assert torch.equal(widened.nan_to_num(12345.0), patterns.float().nan_to_num(12345.0))

    # With a = 0, b = 1, m = 0 and std^2 n = 1 the gradient is x_prev itself, narrowed to the dtype of m.
    exact = patterns.float().flatten()
    finite = exact[exact.isfinite()].sort().values
    between = (finite[1:].double() + finite[:-1].double()) / 2  # ties
    values = torch.cat([finite.double(), between, between.nextafter(torch.tensor(0.0).double()) * (1 + 1e-6)]).float()
    values = torch.cat([values, torch.tensor([65519.0, 65520.0, 3.4e38, -3.4e38, 1e-45, float("nan")])]).unsqueeze(0)
    n = values.numel()
    m = torch.zeros_like(values, dtype=dtype)
    table = torch.tensor([[0, 1, 0, 0, n**-0.5]], dtype=torch.float64)  # std^2 n = 1
    gradient, _ = log_ratio.log_ratio_backward(
        *(m, None, m, None, torch.zeros_like(values), values, row, row, table, 1.0), torch.ones(1), torch.zeros(1)
    )
    assert torch.equal(gradient.float().nan_to_num(12345.0), values.to(dtype).float().nan_to_num(12345.0))


@needs_library
def test_index_out_of_range_is_an_error():
    inputs = log_ratio_inputs(sample=(2, 3, 3))
    for position, bad, message in [(6, 3, "state index"), (6, -1, "state index"), (7, 2, "row index")]:
        broken = list(inputs)
        broken[position] = broken[position].clone()
        broken[position][-1] = bad
        with pytest.raises(RuntimeError, match=message):
            log_ratio.log_ratio_forward(*broken)
        with pytest.raises(RuntimeError, match=message):
            log_ratio.log_ratio_backward(*broken, torch.ones(5), torch.ones(5))


@needs_library
def test_states_without_transitions_get_zero_gradient():
    inputs = log_ratio_inputs(num_states=3, num_transitions=2, sample=(2, 3, 3))  # state 2 has none
    inputs[8][0, 4] = 0.0  # std 0 in the row of states 0 and 2: inf for the first, still 0 for the last
    grad_cond, grad_uncond = log_ratio.log_ratio_backward(*inputs, torch.ones(2), torch.ones(2))
    assert not grad_cond[0].isfinite().any() and grad_cond[1].isfinite().all()
    assert torch.count_nonzero(grad_cond[2]) == torch.count_nonzero(grad_uncond[2]) == 0


@needs_library
def test_binding_refuses_what_the_library_cannot_read():
    cond, uncond, _, _, x_t, _, _, rows, table, g = log_ratio_inputs(sample=(2, 4, 4))
    noise = randn(2, *x_t.shape)
    transposed = cond.transpose(2, 3)
    for arguments, message in [
        ((transposed, uncond, x_t, rows, table, g, 2, None, noise), "cond is not contiguous"),
        ((cond, uncond[:1], x_t, rows, table, g, 2, None, noise), r"uncond has shape \(1, 2, 4, 4\)"),
        ((cond, uncond.half(), x_t, rows, table, g, 2, None, noise), "uncond has dtype torch.float16"),
        ((cond, uncond, x_t.bfloat16(), rows, table, g, 2, None, noise), "latents have dtype torch.bfloat16"),
        ((cond, uncond, x_t, rows.int(), table, g, 2, None, noise), "rows has dtype torch.int32"),
        ((cond, uncond, x_t, rows, table.float(), g, 2, None, noise), "table has dtype torch.float32"),
        ((cond, uncond, x_t, rows, table, g, 2, None, None), "need keys"),
    ]:
        with pytest.raises(ValueError, match=message):
            transition.transition_c(*arguments)


def test_missing_library_says_why(monkeypatch, tmp_path):
    monkeypatch.setenv("SPO_FAST_LIB_DIR", str(tmp_path))
    c_library._open.cache_clear()
    try:
        assert c_library.load("cpu") is None
        assert "libspo_fast_cpu.so does not exist" in c_library.why_missing("cpu")
        assert c_library.load("mps") is None and "mps" in c_library.why_missing("mps")
    finally:
        c_library._open.cache_clear()


def path_without_nvcc(folder: Path) -> str:
    """A PATH with everything on the present one but nvcc, by links in `folder`."""
    folder.mkdir()
    for directory in os.environ["PATH"].split(os.pathsep):
        for tool in Path(directory).iterdir() if Path(directory).is_dir() else ():
            if not tool.name.startswith("nvcc") and not (folder / tool.name).exists():
                (folder / tool.name).symlink_to(tool)
    return str(folder)


def source_copy(target: Path) -> Path:
    """The source tree without what git ignores: an install must not lean on earlier builds."""
    ignore = shutil.ignore_patterns(".git", ".venv*", "build", "lib", "runs", "golden", "*.egg-info", "__pycache__")
    return Path(shutil.copytree(ROOT, target, ignore=ignore))


def build_environment(**changes: str) -> dict[str, str]:
    dropped = {"CUDACXX", "CUDA_PATH", "SPO_FAST_BUILD_CUDA", "SPO_FAST_CUDA_ARCHS"}
    return {**{k: v for k, v in os.environ.items() if k not in dropped}, **changes}


@pytest.mark.slow
@pytest.mark.parametrize("way", ["wheel", "editable", "sdist"])
def test_pip_install_needs_neither_torch_nor_nvcc(way, tmp_path):
    source = source_copy(tmp_path / "source")
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv/bin/python")
    environment = build_environment(PATH=path_without_nvcc(tmp_path / "bin"))
    what = str(source)
    if way == "sdist":
        code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
        packed = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=True)
        what = str(tmp_path / packed.stdout.splitlines()[-1])
        shutil.rmtree(source)
    before = sorted(source.rglob("*"))
    command = [python, "-m", "pip", "install", "--no-deps", *(["-e"] if way == "editable" else []), what]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    if way == "wheel":  # nothing was written beside the sources: they may be read-only
        assert sorted(source.rglob("*")) == before
    code = (
        "import sys, pathlib, ctypes, spo_fast; "
        f"assert not {HEAVY!r} & set(sys.modules); "
        "lib = pathlib.Path(spo_fast.__file__).parent / 'lib'; "
        "ctypes.CDLL(str(lib / 'libspo_fast_cpu.so')); "
        "print(sorted(p.name for p in lib.iterdir()), lib); "
        "print(*sorted(p.name for p in (lib.parent / 'evaluation/pages/templates').iterdir()))"
    )
    printed = in_subprocess(code, python, PYTHONPATH="")
    assert printed.startswith("['libspo_fast_cpu.so']")
    assert (str(source) in printed) == (way == "editable")
    templates = ROOT / "spo_fast/evaluation/pages/templates"
    assert printed.splitlines()[-1].split() == sorted(file.name for file in templates.iterdir())


def build_py(source: Path, target: Path, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "setup.py", "build_py", "--build-lib", str(target)]
    return subprocess.run(
        command, cwd=source, env=build_environment(**environment), capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake on PATH")
def test_nvcc_that_does_not_work_is_an_error(tmp_path):
    source, broken = source_copy(tmp_path / "source"), tmp_path / "bin/nvcc"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    path = f"{broken.parent}{os.pathsep}{os.environ['PATH']}"
    result = build_py(source, tmp_path / "out", PATH=path)
    assert result.returncode != 0 and "SPO_FAST_BUILD_CUDA=0" in result.stderr
    assert build_py(source, tmp_path / "out", PATH=path, SPO_FAST_BUILD_CUDA="0").returncode == 0
    assert [p.name for p in (tmp_path / "out/spo_fast/lib").iterdir()] == ["libspo_fast_cpu.so"]


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None or shutil.which("cmake") is None, reason="needs nvcc and cmake on PATH")
def test_failed_cuda_compile_is_an_error(tmp_path):
    source = source_copy(tmp_path / "source")
    result = build_py(source, tmp_path / "out", SPO_FAST_CUDA_ARCHS="90")
    assert result.returncode == 0 and "architectures 90\n" in result.stdout, result.stderr
    assert len(list((tmp_path / "out/spo_fast/lib").iterdir())) == 2
    with (source / "csrc/transition.cu").open("a") as file:
        file.write("#error broken\n")
    result = build_py(source, tmp_path / "out", SPO_FAST_CUDA_ARCHS="90")
    assert result.returncode != 0 and "CUDA library failed" in result.stderr
    assert "SPO_FAST_BUILD_CUDA=0 builds without CUDA" in result.stderr
