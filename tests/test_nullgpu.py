"""The null GPU (benchmarks/nullgpu) without a CUDA build of torch: its ledger, its stubs, the names it relies on."""

from __future__ import annotations

import ctypes
import importlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.nullgpu import build, patches
from benchmarks.nullgpu.ledger import Entry, by_phase, parse
from benchmarks.nullgpu.watch import own_line, phase_table

MIB = 1 << 20
SUCCESS, INVALID_VALUE, OUT_OF_MEMORY, BAD_CONFIGURATION, REFUSED = 0, 1, 2, 9, 900

DUMP = """\
3\tlaunch\t\tfill
100\tlaunch\tbackward\tvoid gemm<float>(int, int)
7\tlaunch\tbackward\tmemset
2\tcall\tbackward\tcudaStreamSynchronize
1\tcall\tbackward\tcudaMemcpy
5\tcall\tbackward\tcudaEventSynchronize
9\tcall\tbackward\tcudnnBackendFinalize
4\tcopy\trollout\tmemcpy D2D
1\tcopy\trollout\tmemcpy D2H
2097152\tbytes\trollout\tmemcpy D2D
8\tbytes\trollout\tmemcpy D2H
6\tcall\trollout\tcudaGraphLaunch
6\tgraph\trollout\tgraph 1 of 50 nodes
300\treplay\trollout\tgemm
1\tcall\trollout\tcuMemCreate
"""


def test_a_dump_becomes_counts_by_phase() -> None:
    found = by_phase(parse(DUMP))
    assert list(found) == ["between", "backward", "rollout", "all"]
    zero = dict.fromkeys(found["all"], 0)
    assert found["between"] == zero | {"launches": 3}
    assert found["backward"] == zero | {"launches": 107, "waits": 3, "event_waits": 5}
    assert found["rollout"] == zero | {
        "copies": 5,
        "copied_bytes": 2097160,
        "graph_launches": 6,
        "in_graphs": 300,
        "mallocs": 1,
    }
    assert all(found["all"][c] == sum(found[p][c] for p in ("between", "backward", "rollout")) for c in zero)


def test_names_keep_their_commas_and_tabs() -> None:
    assert parse("1\tlaunch\tp\tk<a,\tb>") == [Entry(1, "launch", "p", "k<a,\tb>")]


@pytest.mark.parametrize("line", ["3\tlaunch\tfill", "three\tlaunch\t\tfill"])
def test_what_is_no_entry_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="no entry of a ledger"):
        parse(line)


def test_the_table_has_a_row_a_phase() -> None:
    heading, *rows = phase_table(by_phase(parse(DUMP))).splitlines()
    assert [row.split()[:2] for row in rows] == [
        ["between", "3"],
        ["backward", "107"],
        ["rollout", "0"],
        ["all", "110"],
    ]
    assert heading.endswith("MiB copied")
    assert rows[2].split()[-1] == "2.0"


def test_a_wait_is_blamed_on_the_innermost_line_of_ours() -> None:
    seen: list[str] = []
    torch.ones(1).apply_(lambda _: seen.append(own_line("elsewhere")) or 0.0)  # type: ignore[func-returns-value]
    place, function = seen[0].split(" ")
    assert place.startswith("tests/test_nullgpu.py:")
    assert function in ("test_a_wait_is_blamed_on_the_innermost_line_of_ours", "<lambda>")  # Python 3.10 knows the last


@pytest.mark.parametrize(("module", "name"), patches.PATCHES)
def test_what_is_patched_is_there(module: str, name: str) -> None:
    holder = importlib.import_module(module)
    for part in name.split("."):
        holder = getattr(holder, part)
    assert callable(holder)


@pytest.mark.parametrize(
    ("function", "library"),
    [
        ("cublasLtMatmul", "libcublasLt.so.13"),
        ("cublasGemmEx", "libcublas.so.13"),
        ("cusparseLtInit", "libcusparseLt.so.0"),
        ("cusparseSpMM", "libcusparse.so.12"),
        ("__cudaRegisterFunction", "libcudart.so.13"),
        ("malloc", None),
    ],
)
def test_a_function_belongs_to_the_library_of_its_longest_prefix(function: str, library: str | None) -> None:
    assert build.library_of(function) == library


@pytest.fixture(scope="module")
def compiler() -> str:
    if (found := shutil.which(os.environ.get("CXX", "c++"))) is None:
        pytest.skip("no C++ compiler (CXX, or c++ in PATH)")
    return found


def test_generated_stubs_do_nothing_count_and_give_way(compiler: str, tmp_path: Path) -> None:
    ours = tmp_path / "ours.cpp"
    ours.write_text(
        '#include "nullcuda.h"\n#include <string>\nstatic std::string counted;\n'
        "void nullcuda_count(int, const char *what, long n) { counted += what + std::to_string(n) + ' '; }\n"
        "API int cublasWritten() { return 42; }\nAPI const char *seen() { return counted.c_str(); }\n"
    )
    names = ["cublasWritten", "cublasWork", "cublasSetThing", "cudnnCreateThing", "cublasLtMatmulDescCreate"]
    generated = tmp_path / "generated.cpp"
    generated.write_text(build.generated([*names, *build.REFUSED]))
    flags = ["-shared", "-fPIC", "-std=c++17", f"-I{build.STUBS}"]
    subprocess.run([compiler, *flags, ours, generated, "-o", tmp_path / "stubs.so"], check=True)
    library = ctypes.CDLL(str(tmp_path / "stubs.so"))
    library.seen.restype = ctypes.c_char_p
    assert library.cublasWritten() == 42
    assert [library.cublasWork(1, 2), library.cublasWork(), library.cublasSetThing(3)] == [0, 0, 0]
    assert library.seen() == b"cublasWork1 cublasWork1 "
    assert library.cuMemExportToShareableHandle() == 801
    for create in (library.cudnnCreateThing, library.cublasLtMatmulDescCreate):
        handle = ctypes.c_void_p()
        assert create(ctypes.byref(handle)) == 0
        assert handle.value


def test_what_a_library_destroys_is_given_back(compiler: str, tmp_path: Path) -> None:
    """Ten thousand products' descriptors, 40 MB if they stayed; what others made is left alone."""
    source = tmp_path / "generated.cpp"
    source.write_text(build.generated(["cublasLtMatmulDescCreate", "cublasLtMatmulDescDestroy"]))
    flags = ["-shared", "-fPIC", "-std=c++17", f"-I{build.STUBS}"]
    subprocess.run([compiler, *flags, source, "-o", tmp_path / "stubs.so"], check=True)
    library = ctypes.CDLL(str(tmp_path / "stubs.so"))
    handle, seen = ctypes.c_void_p(), set()
    for _ in range(10_000):
        assert library.cublasLtMatmulDescCreate(ctypes.byref(handle)) == 0
        seen.add(handle.value)
        assert library.cublasLtMatmulDescDestroy(handle) == 0
    assert len(seen) < 100
    mine = ctypes.create_string_buffer(b"mine", 4096)
    assert library.cublasLtMatmulDescDestroy(mine) == library.cublasLtMatmulDescDestroy(handle) == 0
    assert mine.value == b"mine"


class Device:
    """The stubs of the runtime and the driver, called as C."""

    def __init__(self, place: Path):
        self.runtime = ctypes.CDLL(str(place / build.RUNTIME_LIBRARY))
        self.driver = ctypes.CDLL(str(place / "libcuda.so.1"))
        self.runtime.nullcuda_dump.restype = ctypes.c_char_p
        self.runtime.nullcuda_reset()

    def pointer(self, function: str, *args: object) -> ctypes.c_void_p:
        made = ctypes.c_void_p()
        library = self.driver if function.startswith("cuM") else self.runtime
        assert getattr(library, function)(ctypes.byref(made), *args) == SUCCESS
        return made

    def in_use(self) -> int:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.runtime.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total))
        return total.value - free.value - 500 * MIB

    def entries(self) -> dict[tuple[str, str, str], int]:
        return {(e.how, e.phase, e.name): e.count for e in parse(self.runtime.nullcuda_dump().decode())}


@pytest.fixture
def device(stubs: Path) -> Iterator[Device]:
    found = Device(stubs)
    yield found
    assert found.in_use() == 0


@pytest.fixture(scope="module")
def stubs(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    try:
        include = build.cuda_headers()
    except SystemExit as missing:
        pytest.skip(str(missing))
    if torch.version.cuda is not None:
        pytest.skip("PyTorch has loaded the libraries that the stubs would stand for")
    place = tmp_path_factory.mktemp("stubs")
    libraries: dict[str, tuple[tuple[str, ...], list[str]]] = {
        build.RUNTIME_LIBRARY: (build.RUNTIME, []),
        "libcuda.so.1": (("driver.cpp",), [*build.OF_DRIVER, *build.REFUSED]),
    }
    for soname, (own, names) in libraries.items():
        build.compile_library(compiler, include, place, soname, own, build.generated(names), None)
    os.environ["NULLCUDA_GIB"] = "2"
    yield place
    del os.environ["NULLCUDA_GIB"]


def test_memory_is_counted_and_ends(device: Device) -> None:
    p = device.pointer("cudaMalloc", ctypes.c_size_t(3 * MIB))
    assert device.in_use() == 4 * MIB  # granules of 2 MiB
    source, back = ctypes.create_string_buffer(b"12345678"), ctypes.create_string_buffer(9)
    assert device.runtime.cudaMemcpy(p, source, ctypes.c_size_t(8), 1) == SUCCESS
    assert device.runtime.cudaMemcpyAsync(back, p, ctypes.c_size_t(8), 2, None) == SUCCESS
    assert back.value == b"12345678"
    too_much = ctypes.c_void_p()
    assert device.runtime.cudaMalloc(ctypes.byref(too_much), ctypes.c_size_t(1600 * MIB)) == OUT_OF_MEMORY
    assert device.runtime.cudaGetLastError() == OUT_OF_MEMORY
    assert device.runtime.cudaGetLastError() == SUCCESS
    assert device.runtime.cudaFree(p) == SUCCESS
    assert device.runtime.cudaFree(p) == INVALID_VALUE
    assert device.entries() == {
        ("call", "", "cudaMalloc"): 1,
        ("call", "", "cudaMemcpy"): 1,
        ("copy", "", "memcpy H2D"): 1,
        ("bytes", "", "memcpy H2D"): 8,
        ("copy", "", "memcpy D2H"): 1,
        ("bytes", "", "memcpy D2H"): 8,
        ("call", "", "cudaFree"): 1,
    }


@pytest.mark.parametrize(("start", "size"), [(0, 16384), (100, 5000), (4095, 8194), (7, 9), (4096, 4096)])
def test_zeros_are_written_where_they_belong(device: Device, start: int, size: int) -> None:
    p = device.pointer("cudaMalloc", ctypes.c_size_t(2 * MIB))
    place = ctypes.c_void_p((p.value or 0) + start)
    assert device.runtime.cudaMemset(p, 0x55, ctypes.c_size_t(32768)) == SUCCESS
    assert device.runtime.cudaMemset(place, 0, ctypes.c_size_t(size)) == SUCCESS
    assert ctypes.string_at(p, 32768) == b"U" * start + b"\0" * size + b"U" * (32768 - start - size)
    assert device.runtime.cudaFree(p) == SUCCESS


def test_a_mapped_block_counts_until_it_is_released_and_unmapped(device: Device) -> None:
    size, driver = ctypes.c_size_t(4 * MIB), device.driver
    place = device.pointer("cuMemAddressReserve", ctypes.c_size_t(64 * MIB), ctypes.c_size_t(0), None, 0)
    assert device.in_use() == 0
    block = device.pointer("cuMemCreate", size, None, 0)
    assert device.in_use() == 4 * MIB
    assert not device.runtime.nullcuda_on_device(place)
    assert driver.cuMemMap(place, size, ctypes.c_size_t(0), block, 0) == SUCCESS
    assert driver.cuMemMap(place, size, ctypes.c_size_t(0), block, 0) == INVALID_VALUE  # there is something
    last = ctypes.c_void_p((place.value or 0) + 4 * MIB - 1)
    assert device.runtime.nullcuda_on_device(last) & 0xFF == 1
    assert device.runtime.cudaMemset(place, 65, ctypes.c_size_t(4 * MIB)) == SUCCESS
    assert ctypes.string_at(last, 1) == b"A"
    assert device.runtime.cudaFree(place) == INVALID_VALUE
    assert driver.cuMemRelease(block) == SUCCESS
    assert device.in_use() == 4 * MIB
    assert driver.cuMemUnmap(place, size) == SUCCESS
    assert device.in_use() == 0
    assert driver.cuMemCreate(ctypes.byref(ctypes.c_void_p()), ctypes.c_size_t(MIB), None, 0) == INVALID_VALUE
    assert driver.cuMemAddressFree(place, ctypes.c_size_t(64 * MIB)) == SUCCESS


def test_a_graph_counts_where_it_is_replayed(device: Device) -> None:
    runtime = device.runtime
    stream, other = device.pointer("cudaStreamCreate"), device.pointer("cudaStreamCreate")
    p = device.pointer("cudaMalloc", ctypes.c_size_t(2 * MIB))
    assert runtime.cudaStreamBeginCapture(stream, 0) == SUCCESS
    for _ in range(3):
        assert runtime.cudaMemsetAsync(p, 1, ctypes.c_size_t(16), stream) == SUCCESS
    assert ctypes.string_at(p, 1) == b"\0"  # recorded, not done
    graph = ctypes.c_void_p()
    assert runtime.cudaStreamEndCapture(stream, ctypes.byref(graph)) == SUCCESS
    runtime.nullcuda_phase(b"rollout")
    for _ in range(2):
        assert runtime.cudaGraphLaunch(graph, stream) == SUCCESS
    runtime.nullcuda_phase(b"")
    runtime.nullcuda_pause(1)
    runtime.cudaDeviceSynchronize()
    runtime.nullcuda_pause(-1)
    runtime.cudaStreamSynchronize(other)
    found = device.entries()
    assert [k for k in found if k[0] == "graph" and k[2].endswith("of 3 nodes")] and "FAULT" not in str(found)
    assert found["replay", "rollout", "memset"] == 6
    assert found["call", "", "cudaStreamSynchronize"] == 1
    assert ("call", "", "cudaDeviceSynchronize") not in found
    assert runtime.cudaFree(p) == SUCCESS


def test_a_copy_from_the_host_inside_a_capture_is_a_fault(device: Device) -> None:
    """Each replay would copy from the address that was the host tensor's then."""
    runtime, stream, host = device.runtime, device.pointer("cudaStreamCreate"), ctypes.create_string_buffer(16)
    p, q = (device.pointer("cudaMalloc", ctypes.c_size_t(2 * MIB)) for _ in range(2))
    assert runtime.cudaStreamBeginCapture(stream, 0) == SUCCESS
    assert runtime.cudaMemcpyAsync(q, p, ctypes.c_size_t(16), 3, stream) == SUCCESS  # between the device's: none
    assert "FAULT" not in str(device.entries())
    assert runtime.cudaMemcpyAsync(p, host, ctypes.c_size_t(16), 1, stream) == SUCCESS
    graph = ctypes.c_void_p()
    assert runtime.cudaStreamEndCapture(stream, ctypes.byref(graph)) == SUCCESS
    (fault,) = [name for how, _, name in device.entries() if how == "FAULT"]
    assert fault.startswith("memcpy H2D inside a capture")
    assert runtime.cudaFree(p) == runtime.cudaFree(q) == SUCCESS


def test_what_a_capture_forbids_is_a_fault(device: Device) -> None:
    runtime = device.runtime
    stream, other = device.pointer("cudaStreamCreate"), device.pointer("cudaStreamCreate")
    assert runtime.cudaStreamBeginCapture(None, 0) == REFUSED
    assert runtime.cudaStreamBeginCapture(stream, 0) == SUCCESS
    assert runtime.cudaStreamSynchronize(stream) == REFUSED
    assert runtime.cudaMalloc(ctypes.byref(ctypes.c_void_p()), ctypes.c_size_t(8)) == REFUSED
    runtime.cudaMemsetAsync(None, 0, ctypes.c_size_t(0), other)
    graph = ctypes.c_void_p()
    assert runtime.cudaStreamEndCapture(stream, ctypes.byref(graph)) == 901  # invalidated
    assert graph.value is None
    assert {name for how, _, name in device.entries() if how == "FAULT"} == {
        "capture of the legacy stream",
        "cudaStreamSynchronize of a stream that is captured",
        "not permitted while a stream is captured: cudaMalloc",
        "on a stream that is not captured while another is: memset",
        "an empty graph was captured",
    }


@pytest.mark.parametrize(
    ("grid", "block", "shared"),
    [((0, 1, 1), (1, 1, 1), 0), ((1, 65536, 1), (1, 1, 1), 0), ((1, 1, 1), (1025, 1, 1), 0)],
)
def test_a_launch_that_an_h200_refuses_is_a_fault(device: Device, grid: tuple, block: tuple, shared: int) -> None:
    three = ctypes.c_uint * 3
    assert device.runtime.nullcuda_bad_launch(b"k", three(*grid), three(*block), ctypes.c_size_t(shared)) & 0xFF == 1
    assert [how for how, _, _ in device.entries()] == ["FAULT"]
    good = device.runtime.nullcuda_bad_launch(b"k", three(1, 65535, 1), three(1024, 1, 1), ctypes.c_size_t(232448))
    assert good & 0xFF == 0
