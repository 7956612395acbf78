"""What travels to a GPU that is lent without a network: wheels and compile caches, in a folder that git ignores.

    python -m benchmarks.gpu_pack --cache DIR [--wheels NAME==VERSION ...]

The caches are what gpu_run.py --cache DIR left (gpu_rehearsal.py fills them without a GPU). Of Triton's entries the
binaries and what describes them travel; Inductor's are its graphs, without the choices between kernels that were
timed where nothing was computed: the GPU makes them again. They belong to one commit, one PyTorch and one Triton.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.records import ROOT

PACK = ROOT / ".gpu"
LIMIT_BYTES = 64 << 20  # of all that travels, the checkout among it
UNPACKED = Path("/tmp/spo_fast_cache")
"""Where the caches are unpacked on the GPU's machine: Triton's name it."""
PYTHON = "3.12"
WHEELS = ("diffusers==0.42.1", "requests==2.34.2", "importlib_metadata==10.2.0", "zipp==4.1.2", "peft==0.21.2")
EMPTIED = {".ttir", ".ttgir", ".llir", ".ptx", ".source"}
"""Steps on the way to a binary: files that must be there, and that nothing reads once it is."""
ANYWHERE = tuple(f"manylinux_2_{n}_x86_64" for n in (28, 27, 24, 17)) + ("manylinux2014_x86_64", "manylinux1_x86_64")
COMMAND = f"""\
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \\
    --target /tmp/site .gpu/*.whl || exit
mkdir -p {UNPACKED} && tar -xf .gpu/cache.tar.xz -C {UNPACKED}; export PYTHONPATH=/tmp/site
python3 benchmarks/gpu_run.py --out "$OUT" --cache {UNPACKED} --call 1"""


def kept_files(cache: Path) -> Iterator[tuple[Path, bool]]:
    """Files of a cache that travel, and whether empty."""
    for path in sorted(p for p in cache.rglob("*") if p.is_file()):
        folder, kind, *_ = path.relative_to(cache).parts
        if ".tmp" in path.name or path.suffix in (".best_config", ".lock"):
            continue
        if folder == "triton":
            yield path, path.suffix in EMPTIED
        elif folder == "inductor" and kind in ("fxgraph", "aotautograd"):
            yield path, False


def moved(group: bytes, folder: Path) -> bytes:
    """Triton's list of an entry's files, in `folder`: it holds whole paths, and files that are not there are missed."""
    listed = json.loads(group)
    paths = {name: str(folder / Path(path).name) for name, path in listed["child_paths"].items()}
    return json.dumps(listed | {"child_paths": paths}).encode()


def pack_cache(cache: Path, archive: Path) -> int:
    """Writes the archive, to be unpacked at UNPACKED; returns the number of binaries in it."""
    binaries = 0
    with tarfile.open(archive, "w:xz", preset=6) as tar:
        for path, empty in kept_files(cache):
            name = path.relative_to(cache)
            info, content = tarfile.TarInfo(str(name)), b"" if empty else path.read_bytes()
            if name.parts[0] == "triton" and path.name.startswith("__grp__"):
                content = moved(content, UNPACKED / name.parent)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
            binaries += path.suffix == ".cubin"
    return binaries


def download(wheels: Sequence[str], folder: Path) -> None:
    """Each for the GPU machine's Python, none of its needs: name them."""
    places = [word for platform in ANYWHERE for word in ("--platform", platform)]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "-d",
        str(folder),
    ]
    subprocess.run([*command, "--python-version", PYTHON, "--implementation", "cp", *places, *wheels], check=True)


def travelling_bytes() -> int:
    """Tracked files, those git does not ignore, the C library, and the pack."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
    files = [ROOT / name for name in filter(None, names)]
    files += [f for folder in (PACK, ROOT / "spo_fast" / "lib") for f in folder.glob("*")]
    return sum(f.stat().st_size for f in files if f.is_file())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, help="compile caches; none without it")
    parser.add_argument("--wheels", nargs="*", default=WHEELS, metavar="NAME==VERSION")
    args = parser.parse_args(argv)
    shutil.rmtree(PACK, ignore_errors=True)
    PACK.mkdir()
    if args.wheels:
        download(args.wheels, PACK)
    if args.cache:
        print(f"{pack_cache(args.cache, PACK / 'cache.tar.xz')} compiled kernels")
    for file in sorted(PACK.iterdir()):
        print(f"{file.stat().st_size / 2**20:7.2f} MiB  {file.name}")
    size = travelling_bytes()
    print(
        f"{size / 2**20:7.2f} MiB  with the checkout and spo_fast/lib\n\ncarry .gpu and spo_fast/lib; there:\n{COMMAND}"
    )
    if size > LIMIT_BYTES:
        raise SystemExit(f"more than {LIMIT_BYTES >> 20} MiB: leave a wheel out, or a row out of what fills the cache")


if __name__ == "__main__":
    main()
