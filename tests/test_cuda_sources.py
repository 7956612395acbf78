"""csrc/*.cu, compiled for this CPU by tests/cuda_on_cpu: they pass the tests of their C++ twins, and faults show."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import test_build
import test_merge_lora
import test_resize_normalize
import test_transition
import torch
from torch import Tensor

from spo_fast.ops import c_library, log_ratio, resize_normalize, transition

ROOT = Path(__file__).parents[1]
CUDA_ON_CPU = ROOT / "tests/cuda_on_cpu"
SOURCES = {path.stem: path.read_text() for path in sorted((ROOT / "csrc").glob("*.cu"))}
CPU_LIBRARY = c_library.load("cpu")
COMPILER = shlex.split(os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or "")
# as the CPU library: no fused multiply-add, so that equal formulas give equal bits
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-DSPO_WITH_CUDA"]
FLAGS += ["-fsanitize=bounds"]  # its handler is in runtime.cpp
FLAGS += [f"-I{ROOT / 'csrc'}", f"-I{CUDA_ON_CPU}", "-include", "cuda_runtime_api.h"]

pytestmark = [
    pytest.mark.skipif(not COMPILER, reason="needs a C++ compiler on PATH"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the tests of the C++ twins run csrc/*.cu on the device here"),
]

# ---------------------------------------------------------------------------------------------------- compiling


def compiled(name: str, text: str, folder: Path) -> str:
    """An object file. Launches, kernel<<<...>>>(...), are no C++; the rest is compiled as it stands."""
    text = re.sub(r"([\w:]+)<<<([^;]*?)>>>\(([^;]*)\);", r"cuda_on_cpu::launch(\2, [&] { \1(\3); });", text)
    (folder / f"{name}.cpp").write_text(f'#line 1 "{name}"\n{text}')
    command = [*COMPILER, *FLAGS, "-c", f"{name}.cpp", "-o", f"{name}.o"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return str(folder / f"{name}.o")


def linked(objects: list[str], folder: Path) -> ctypes.CDLL:
    path = str(folder / "libspo_fast_cuda_on_cpu.so")
    subprocess.run([*COMPILER, "-shared", *objects, "-o", path], check=True)
    library = ctypes.CDLL(path)
    library.spo_error_string.restype = ctypes.c_char_p
    return library


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> dict[str, str]:
    """source -> its object file."""
    folder = tmp_path_factory.mktemp("objects")
    others = {path.stem: path.read_text() for path in (ROOT / "csrc/common.cpp", CUDA_ON_CPU / "runtime.cpp")}
    return {name: compiled(name, text, folder) for name, text in {**SOURCES, **others}.items()}


@pytest.fixture(scope="module")
def cuda_on_cpu(objects, tmp_path_factory) -> ctypes.CDLL:
    return linked([*objects.values()], tmp_path_factory.mktemp("library"))


# ---------------------------------------------------------------------------------------------------- guard bytes

TAKE_A_STRUCT = re.findall(
    r"^SPO_API int (spo_\w+)\(const spo_\w+_args \*args, void \*stream\)", test_build.HEADER, re.MULTILINE
)
OUTPUTS = set(re.findall(r"^  void \*(\w+);", test_build.HEADER, re.MULTILINE))


class Guarded:
    """A library whose functions get copies of their tensors that stand between guard bytes.

    What is read outside a tensor is NaN, or index 0; what is written there, or into an input, is an error.
    """

    def __init__(self, library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
        self.library, self.calls = library, 0
        self.given: dict[int, Tensor] = {}  # by address: the tensors of the arguments that are made
        as_c = c_library._as_c

        def remember(value):
            if isinstance(value, Tensor):
                self.given[value.data_ptr()] = value.detach()
            return as_c(value)

        monkeypatch.setattr(c_library, "_as_c", remember)
        monkeypatch.setattr(c_library, "load", lambda device_type: self)

    def __getattr__(self, name: str):
        self.calls += 1
        function = getattr(self.library, name)
        return functools.partial(self.call, function) if name in TAKE_A_STRUCT else function

    def call(self, function, arguments, stream):
        arguments = arguments._obj  # of ctypes.byref
        copies = {}
        for name, kind in test_build.fields_of(type(arguments)):
            address = getattr(arguments, name)
            if kind is c_library.POINTER and address:
                copies[name] = copy = GuardedCopy(self.given[address], name in OUTPUTS)
                setattr(arguments, name, copy.address)
        code = function(ctypes.byref(arguments), stream)
        for name, copy in copies.items():
            assert copy.guards_stand(), f"{name}: written outside the tensor"
            if name in OUTPUTS:
                copy.original.copy_(copy.inside)
            else:
                assert torch.equal(copy.inside, copy.original), f"{name}: an input was written"
        self.given.clear()
        return code


class GuardedCopy:
    def __init__(self, tensor: Tensor, is_output: bool) -> None:
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.original = tensor.as_strided((span,), (1,)).view(torch.uint8)
        width = 4096 + min(len(self.original), 1 << 20) // 16 * 16
        # all ones are NaN in every float type, which must not stand before outputs: a NaN written there would hide
        fill = 0x5A if is_output else 0xFF if tensor.is_floating_point() else 0
        self.guard = torch.full((width,), fill, dtype=torch.uint8)
        self.bytes = torch.cat([self.guard, self.original, self.guard])
        self.inside = self.bytes[width:-width]
        self.address = self.inside.data_ptr()

    def guards_stand(self) -> bool:
        width = len(self.guard)
        return torch.equal(self.bytes[:width], self.guard) and torch.equal(self.bytes[-width:], self.guard)


@pytest.fixture(autouse=True)
def guarded(cuda_on_cpu, monkeypatch) -> Iterator[Guarded]:
    """Backend c on CPU tensors calls the .cu sources; a test that does not get there is none."""
    guarded = Guarded(cuda_on_cpu, monkeypatch)
    yield guarded
    assert guarded.calls > 0


# ---------------------------------------------------------------------------------------------------- the twins' tests


def again(test: Callable[..., None], **values: list) -> Callable[..., None]:
    """A test of the C++ twins with the values given here for what it is parametrised with; backend c, if any."""

    @functools.wraps(test)
    def run(**arguments):
        test(**arguments)

    run.pytestmark = []
    for mark in getattr(test, "pytestmark", []):
        if mark.name == "parametrize":
            names = mark.args[0] if isinstance(mark.args[0], str) else "_".join(mark.args[0])
            chosen = ["c"] if names == "backend" else values.pop(names, mark.args[1])
            run.pytestmark.append(pytest.mark.parametrize(mark.args[0], chosen).mark)
    assert not values, f"{test.__name__} is not parametrised with {[*values]}"
    return run


# n around the 256 threads of a block, each with four elements, and the 1024 of a reduction
EDGES = [(2, 1, 1, n) for n in (255, 256, 257, 1023, 1024, 1025, 2049)]
SHAPES = [*test_transition.SHAPES, *EDGES]
test_log_ratio = again(test_transition.test_log_ratio_and_gradients_match_float64, shape=SHAPES)
test_transition_supplied = again(test_transition.test_transition_matches_float64_with_supplied_noise, shape=SHAPES)
test_transition_keyed = again(test_transition.test_keyed_noise_is_the_same_on_every_backend_and_for_any_batching)
test_nothing = again(test_transition.test_nothing_comes_of_nothing)
test_layouts = again(test_transition.test_layouts_and_errors)
test_identical_networks = again(test_transition.test_identical_networks_have_exactly_zero_log_ratio)

# 16 x 16 output pixels are a block
IMAGES = [*test_resize_normalize.SHAPES, ((2, 3, 17, 33), 16), ((2, 3, 40, 19), 17)]
test_resize = again(test_resize_normalize.test_matches_float64, shape_size=IMAGES)
test_resize_types = again(test_resize_normalize.test_output_types)
test_resize_strides = again(test_resize_normalize.test_any_strides_are_read_in_place)
test_resize_extremes = again(test_resize_normalize.test_one_image_none_and_extremes)
test_resize_overshoot = again(test_resize_normalize.test_overshoot_goes_through_the_resize)

# 256 threads with eight elements each
WEIGHTS = [(1, 1), (1, 9), (37, 53), (160, 320), (1, 2047), (1, 2048), (1, 2049)]
test_merge_neighbours = again(test_merge_lora.test_every_element_is_a_neighbour_of_the_exact_sum)
test_merge_bits = again(test_merge_lora.test_backends_agree_bit_for_bit, shape=WEIGHTS)
test_merge_mean = again(test_merge_lora.test_the_mean_of_many_roundings_is_the_value)
test_merge_grid = again(test_merge_lora.test_a_number_of_the_grid_stays)
test_merge_key = again(test_merge_lora.test_a_key_is_a_rounding)
test_merge_layer = again(test_merge_lora.test_a_merged_layer_moves_as_the_unmerged_lora_does)
test_merge_layouts = again(test_merge_lora.test_layouts_and_errors)

test_philox = again(test_build.test_philox_known_answers)
test_16_bit_conversions = again(test_build.test_16_bit_conversions_agree_with_torch)
test_states_without_transitions = again(test_build.test_states_without_transitions_get_zero_gradient)


# ---------------------------------------------------------------------------------------------------- beyond them


def test_order_of_threads_never_shows(guarded):
    """Races would: the last block and thread first, then the first."""
    results = []
    for backwards in (1, 0):
        guarded.library.cuda_on_cpu_backwards(backwards)
        results.append(test_build.every_op(test_build.log_ratio_inputs(sample=(4, 33, 31))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.skipif(CPU_LIBRARY is None, reason=c_library.why_missing("cpu"))
def test_noise_is_that_of_the_cpu_library(guarded):
    """A million normals each: children of mean 0 and standard deviation 1. The words are the same; a GPU's logarithm,
    sine and cosine are float32 functions, the CPU library's are rounded from float64: a few last bits differ."""
    zeros, rows = torch.zeros(2, 4, 256, 256), torch.zeros(2, dtype=torch.int64)
    table = torch.tensor([[1, 0, 1, 0, 1]], dtype=torch.float64)
    draws = []
    for library in (guarded.library, CPU_LIBRARY):
        guarded.library = library
        keys = test_transition.keys(2)
        draws.append(transition.transition_c(zeros, None, zeros, rows, table, 1.0, 2, keys, None)[1])
    there, here = draws
    assert ((there.double() - here.double()).abs() <= 8 * 2**-24 * here.double().abs()).all()
    assert (there == here).double().mean() > 0.9


def test_as_many_samples_as_a_grid_has_rows():
    """The last of 65535 samples is right, one more is refused."""
    most = 65535
    table = torch.tensor([[1, 2, 3, 0, 1]], dtype=torch.float64)
    x_prev, one = torch.full((1, 1), 3.0), torch.ones(1)

    def x0(zeros, rows):  # 3 x_t
        return transition.transition_c(zeros, None, zeros + 2, rows, table, 1.0, 0, None, None)[0]

    def gradient(zeros, rows):  # b x_prev / std^2, in the last state alone
        inputs = (zeros, None, zeros, None, zeros, x_prev, rows.new_tensor([len(rows) - 1]), rows, table, 1.0)
        return log_ratio.log_ratio_backward(*inputs, one, one)[0]

    def pixel(zeros, rows):  # 1 / 2
        images = zeros.view(-1, 1, 1, 1).expand(-1, 3, 1, 1)
        return resize_normalize.resize_normalize_c(images, 1, [0.0] * 3, [1.0] * 3, torch.float32)

    zeros, rows = torch.zeros(most + 1, 1), torch.zeros(most + 1, dtype=torch.int64)
    for op, last in ((x0, 6.0), (gradient, 6.0), (pixel, 0.5)):
        assert bool((op(zeros[:most], rows[:most])[-1] == last).all())
        with pytest.raises(RuntimeError, match="at most 65535 samples at a time on CUDA"):
            op(zeros, rows)


# ---------------------------------------------------------------------------------------------------- planted faults


def see_supplied(poisoned, guarded):
    test_transition.test_transition_matches_float64_with_supplied_noise(
        "c", torch.float32, (2, 1, 1, 1025), 3, poisoned
    )


def see_keyed(poisoned, guarded):
    test_transition.test_keyed_noise_is_the_same_on_every_backend_and_for_any_batching("c", (4, 4, 9, 7))


def see_log_ratio(poisoned, guarded):
    test_transition.test_log_ratio_and_gradients_match_float64("c", torch.float32, (2, 4, 33, 31), 2.3, poisoned)


def see_order(poisoned, guarded):
    test_order_of_threads_never_shows(guarded)


def see_resize(poisoned, guarded):
    layout = torch.contiguous_format
    test_resize_normalize.test_matches_float64("c", torch.float32, (3, 3, 70, 33), 40, layout, poisoned)


def see_merge(poisoned, guarded):
    test_merge_lora.test_backends_agree_bit_for_bit("c", torch.bfloat16, (37, 53))


def see_samples(poisoned, guarded):
    test_as_many_samples_as_a_grid_has_rows()


BARRIER, LEAVE, MOST = (
    "  __syncthreads();\n",
    "  if (warp != 0) return;\n",
    "if (op.B > spo::MAX_GRID_Y) return SPO_ERROR_SHAPE;",
)
WRONG, OUTSIDE, STUCK = "^assert ", "written outside the tensor", "not every thread reaches"
FAULTS = {  # source, right, wrong, what sees it, what it says
    "mean": ("transition", "mean[lane] = a * x + b * m", "mean[lane] = a * x - b * m", see_supplied, WRONG),
    "tail": ("transition", "if (element >= args.n) continue;\n    const", "const", see_supplied, OUTSIDE),
    "child": ("transition", "(k * args.B + sample) * args.n", "(k + args.B * sample) * args.n", see_supplied, WRONG),
    "key": ("transition", "args.keys + sample * 5, k", "args.keys, k", see_keyed, WRONG),
    "half_warp": ("transition", "offset > 0", "offset > 1", see_log_ratio, WRONG),
    "residual": ("transition", "(next - (drift + b * frozen))", "(next + (drift + b * frozen))", see_log_ratio, WRONG),
    "no_barrier": ("transition", BARRIER, "", see_order, WRONG),
    "late_barrier": ("transition", BARRIER + LEAVE, LEAVE + BARRIER, see_order, STUCK),
    "states": ("transition", "args.states[t] != state", "args.states[t] > state", see_log_ratio, WRONG),
    "past_the_states": ("transition", "t < args.T", "t <= args.T", see_log_ratio, WRONG),
    "past_an_array": ("transition", "lane < 4", "lane < 5", see_supplied, "an index outside an array"),
    "uncond": ("transition", "(1 - args.guidance) * grad", "(args.guidance - 1) * grad", see_log_ratio, WRONG),
    "grid": ("transition", MOST, "", see_samples, "a grid or a block that no card takes"),
    "top": ("resize_normalize", "at / args.size + args.top", "at / args.size", see_resize, WRONG),
    "tail_pixels": ("resize_normalize", "if (at >= args.size * args.size) return;", "", see_resize, OUTSIDE),
    "tail_groups": ("merge", "if (group < q) merge", "merge", see_merge, WRONG),
}


ALWAYS = {"mean", "key", "half_warp", "no_barrier", "late_barrier", "tail_pixels", "tail_groups"}


@pytest.mark.parametrize("fault", [pytest.param(f, marks=() if f in ALWAYS else pytest.mark.slow) for f in FAULTS])
def test_a_planted_fault_is_seen(fault, objects, guarded, poisoned, tmp_path):
    assert {source for source, *_ in FAULTS.values()} == set(SOURCES)
    source, right, wrong, see, message = FAULTS[fault]
    faulty = SOURCES[source].replace(right, wrong)
    assert faulty != SOURCES[source]
    guarded.library = linked([*{**objects, source: compiled(source, faulty, tmp_path)}.values()], tmp_path)
    with pytest.raises((AssertionError, RuntimeError), match=message):
        see(poisoned, guarded)
