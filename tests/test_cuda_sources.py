"""csrc/*.cu, compiled for this CPU by tests/cuda_on_cpu: they pass the tests of their C++ twins, and faults show."""

from __future__ import annotations

import ctypes
import functools
import os
import re
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

from spo_fast.ops import c_library, log_ratio, transition
from spo_fast.ops.merge_lora import MERGE

ROOT = Path(__file__).parents[1]
CUDA_ON_CPU = ROOT / "tests/cuda_on_cpu"
SOURCES = {path.stem: path.read_text() for path in sorted((ROOT / "csrc").glob("*.cu"))}
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
# as the CPU library: no fused multiply-add, so that equal formulas give equal bits
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-DSPO_WITH_CUDA"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]  # of unrolling
FLAGS += [f"-I{ROOT / 'csrc'}", f"-I{CUDA_ON_CPU}", "-include", "cuda_runtime_api.h"]

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler on PATH"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the tests of the C++ twins run csrc/*.cu on the device here"),
]

# ---------------------------------------------------------------------------------------------------- compiling


def compiled(name: str, text: str, folder: Path) -> str:
    """An object file. Launches, kernel<<<...>>>(...), are no C++; the rest is compiled as it stands."""
    text = re.sub(r"([\w:]+)<<<([^;]*?)>>>\(([^;]*)\);", r"cuda_on_cpu::launch(\2, [&] { \1(\3); });", text)
    (folder / f"{name}.cpp").write_text(f'#line 1 "{name}"\n{text}')
    command = [COMPILER, *FLAGS, "-c", f"{name}.cpp", "-o", f"{name}.o"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return str(folder / f"{name}.o")


def linked(objects: list[str], folder: Path) -> ctypes.CDLL:
    path = str(folder / "libspo_fast_cuda_on_cpu.so")
    subprocess.run([COMPILER, "-shared", *objects, "-o", path], check=True)
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
BEFORE_INPUTS, BEFORE_OUTPUTS = 0xFF, 0x5A  # all ones: NaN in every float type, -1 in integers


class Guarded:
    """A library whose functions get copies of their tensors that stand between guard bytes.

    What is read outside a tensor is NaN, or the index -1; what is written there, or into an input, is an error.
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
                copies[name] = copy = GuardedCopy(
                    self.given[address], BEFORE_OUTPUTS if name in OUTPUTS else BEFORE_INPUTS
                )
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
    def __init__(self, tensor: Tensor, fill: int) -> None:
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.original = tensor.as_strided((span,), (1,)).view(torch.uint8)
        width = 4096 + min(len(self.original), 1 << 20) // 16 * 16
        self.guard = torch.full((width,), fill, dtype=torch.uint8)
        self.bytes = torch.cat([self.guard, self.original, self.guard])
        self.inside = self.bytes[width:-width]
        self.address = self.inside.data_ptr()

    def guards_stand(self) -> bool:
        width = len(self.guard)
        return torch.equal(self.bytes[:width], self.guard) and torch.equal(self.bytes[-width:], self.guard)


@pytest.fixture(autouse=True)
def in_place_of_the_cpu_library(request, monkeypatch) -> Iterator[None]:
    """Backend c on CPU tensors calls the .cu sources; a test that does not get there is none."""
    if "objects" in request.fixturenames and "cuda_on_cpu" not in request.fixturenames:
        yield  # the test makes a library of its own
        return
    guarded = Guarded(request.getfixturevalue("cuda_on_cpu"), monkeypatch)
    yield
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
