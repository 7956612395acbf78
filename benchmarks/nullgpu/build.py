"""Builds the stub libraries of a null GPU: python build.py PYTHON OUT, or check (`make nullgpu` calls both).

PYTHON has a CUDA build of PyTorch; OUT gets the libraries that it would load. What stubs/ defines is compiled; every
other function that PyTorch or bitsandbytes asks for is generated: it does nothing and returns 0, and most are counted.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

STUBS = Path(__file__).parent / "stubs"
RUNTIME_LIBRARY = "libcudart.so.13"
LIBRARIES = {  # as PyTorch 2.11 for CUDA 13 asks for them: how their functions' names begin (the longest fits)
    RUNTIME_LIBRARY: "cuda",  # first: the others are linked with it
    "libcublasLt.so.13": "cublasLt",
    "libcublas.so.13": "cublas",
    "libcudnn.so.9": "cudnn",
    "libcusparseLt.so.0": "cusparseLt",
    "libcusparse.so.12": "cusparse",
    "libcusolver.so.12": "cusolver",
    "libcufft.so.12": "cufft",
    "libcurand.so.10": "curand",
    "libnccl.so.2": "nccl",
    "libnvshmem_host.so.3": "nvshmem",
    "libnvrtc.so.13": "nvrtc",
    "libcufile.so.0": "cuFile",
    "libcupti.so.13": "cupti",
}
RUNTIME = ("ledger.cpp", "memory.cpp", "streams.cpp", "runtime.cpp")
OF_DRIVER = (  # found by name at run time, so that no list of undefined symbols has them
    *("cuInit", "cuCtxSetCurrent", "cuCtxPushCurrent_v2", "cuCtxSetLimit", "cuModuleUnload", "cuMemSetAccess"),
    *("cuFuncSetCacheConfig", "cuTensorMapEncodeTiled", "cuTensorMapEncodeIm2col"),
)
REFUSED = (  # by the driver: CUDA_ERROR_NOT_SUPPORTED
    *("cuMemExportToShareableHandle", "cuMemImportFromShareableHandle", "cuMemRetainAllocationHandle"),
    *("cuMemGetAllocationPropertiesFromHandle", "cuLinkCreate_v2", "cuLinkAddData_v2", "cuLinkComplete"),
)


OF_OBJECTS = r"(cudnn|cusparse|cusolverDn|cublasLt)\w*"
OBJECTS = """#include <mutex>
#include <unordered_set>
static std::mutex lock;
static std::unordered_set<void *> objects;
static void *object() {
  std::lock_guard<std::mutex> held(lock);
  return *objects.insert(new char[4096]()).first;
}
static void end(void *p) {  // of others' making nothing is known
  std::lock_guard<std::mutex> held(lock);
  if (objects.erase(p)) delete[] (char *)p;
}
"""
"""Products make such by the hundred an iteration: what a library destroys is given back."""


def library_of(function: str) -> str | None:
    """The soname whose functions begin like this one."""
    plain = function.lstrip("_")
    fits = [(len(prefix), soname) for soname, prefix in LIBRARIES.items() if plain.startswith(prefix)]
    return max(fits)[1] if fits else None


def generated(functions: Iterable[str]) -> str:
    """C++ of functions that do nothing. Weak: where a file of stubs/ has one of the name, the linker takes that."""
    made = [f'#include "nullcuda.h"\n#define STUB API __attribute__((weak)) int\n{OBJECTS}']
    for name in sorted(set(functions)):
        arguments, body = "", f'nullcuda_count(CALL, "{name}", 1); return 0;'
        if re.match(OF_OBJECTS + "Create", name):
            arguments, body = "void **handle", "*handle = object(); return 0;"
        elif re.match(OF_OBJECTS + "Destroy", name):
            arguments, body = "void *handle", "end(handle); return 0;"
        elif name in REFUSED:
            body = "return 801;"
        elif re.search("Get|Set|Destroy|Register|Unregister", name):  # too many to be of interest
            body = "return 0;"
        made.append(f"STUB {name}({arguments}) {{ {body} }}\n")
    return "".join(made)


def undefined(libraries: Iterable[Path]) -> set[str]:
    """Functions that shared libraries ask of others."""
    listed = _run("nm", "-D", "--undefined-only", *map(str, libraries))
    return {line.split()[-1].split("@")[0] for line in listed.splitlines() if " U " in line}


def build(python: str, out: Path) -> None:
    """Compile all stubs into `out`. Raises SystemExit that says what is missing."""
    include, compiler = cuda_headers(), cxx()
    where = _run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    asking = [*Path(where).glob("torch/lib/*.so"), *Path(where).glob("bitsandbytes/libbitsandbytes_cuda13*.so")]
    if not any(path.name == "libtorch_cuda.so" for path in asking):
        raise SystemExit(f"nullgpu: the torch of {python} is no CUDA build. {where}/torch/lib has no libtorch_cuda.so.")
    functions = undefined(asking)
    out.mkdir(parents=True, exist_ok=True)
    for soname, prefix in LIBRARIES.items():
        own = RUNTIME if prefix == "cuda" else [f"libraries/{prefix}.cpp"]
        own = [name for name in own if (STUBS / name).is_file()]
        names = [name for name in functions if library_of(name) == soname]
        # symbols have a version: PyTorch asks for cudaMalloc@libcudart.so.13
        version = "NVSHMEM" if prefix == "nvshmem" else soname
        compile_library(compiler, include, out, soname, own, generated(names), version)
    compile_library(compiler, include, out, "libcuda.so.1", ["driver.cpp"], generated([*OF_DRIVER, *REFUSED]), None)
    link = out / "libcuda.so"  # what Triton's launcher is linked with
    link.unlink(missing_ok=True)
    link.symlink_to("libcuda.so.1")
    print(f"nullgpu: {len(LIBRARIES) + 1} libraries in {out}")


def compile_library(
    compiler: str, include: Path, out: Path, soname: str, own: Sequence[str], stubs: str, version: str | None
) -> None:
    """One of them, of files of stubs/ and of generated code."""
    flags = ["-O1", "-std=c++17", "-shared", "-fPIC", "-w", f"-I{STUBS}", f"-I{include}"]
    link = ["-o", str(out / soname), f"-Wl,-soname,{soname}", "-Wl,-rpath,$ORIGIN", "-ldl"]
    if soname != RUNTIME_LIBRARY:  # which holds the ledger
        link += [f"-L{out}", f"-l:{RUNTIME_LIBRARY}"]
    with tempfile.TemporaryDirectory() as scratch:
        source, script = Path(scratch, "stubs.cpp"), Path(scratch, "symbols.map")
        source.write_text(stubs)
        if version is not None:
            script.write_text(version + " { global: *; };\n")
            link.append(f"-Wl,--version-script={script}")
        _run(compiler, *flags, *(str(STUBS / name) for name in own), str(source), *link)


def cxx() -> str:
    """The C++ compiler. Raises SystemExit where there is none."""
    if (compiler := shutil.which(os.environ.get("CXX", "c++"))) is None:
        raise SystemExit("nullgpu: no C++ compiler. Install one, or name it: CXX=g++ make nullgpu")
    return compiler


def cuda_headers() -> Path:
    """Of the CUDA toolkit. Raises SystemExit where there are none."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    if not (home / "include" / "cuda_runtime_api.h").is_file():
        raise SystemExit(
            f"nullgpu: no CUDA headers: {home}/include/cuda_runtime_api.h is not there. Install those of CUDA 13 "
            "(cuda-cudart-dev and cuda-driver-dev; no GPU, no driver), or set CUDA_HOME."
        )
    return home / "include"


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"nullgpu: {command[0]} failed:\n{done.stderr[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    if sys.argv[1:] == ["check"]:  # before anything large is downloaded
        cuda_headers(), cxx()
    elif len(sys.argv) == 3:
        build(sys.argv[1], Path(sys.argv[2]).resolve())
    else:
        raise SystemExit(__doc__)
