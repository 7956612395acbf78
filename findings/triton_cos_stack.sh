#!/usr/bin/env bash
# tl.cos of a float32 keeps a table for the reduction of huge angles on the stack: 32 bytes a thread under Triton 3.6.0,
# 3.7.0 and 3.8.0 (sm_90, ptxas -v), although no register spills. Under 3.9.0 there is no stack frame.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/v"
"$dir/v/bin/pip" install --quiet torch==2.13.0 numpy==1.26.4 packaging
cat > "$dir/kernel.py" <<'PY'
import re, subprocess, sys
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

@triton.jit
def cosine(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.cos(tl.load(x_ptr + at)))

source = ASTSource(cosine, {"x_ptr": "*fp32", "y_ptr": "*fp32", "BLOCK": "constexpr"}, {"BLOCK": 128})
ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
open(f"{sys.argv[1]}/k.ptx", "w").write(ptx)
target = re.search(r"\.target (sm_\w+)", ptx)[1]
command = [get_ptxas(90).path, "-v", f"-arch={target}", f"{sys.argv[1]}/k.ptx", "-o", f"{sys.argv[1]}/k.cubin"]
said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
print(triton.__version__, *re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", said).groups())
PY
seen=$(
    for version in 3.6.0 3.7.0 3.8.0 3.9.0; do
        "$dir/v/bin/pip" install --quiet --no-deps "triton==$version" >&2
        TRITON_CACHE_DIR="$dir/cache-$version" "$dir/v/bin/python" "$dir/kernel.py" "$dir" 2> /dev/null
    done
)
echo "$seen"
diff <(echo "$seen") - <<'TXT'
3.6.0 32 0
3.7.0 32 0
3.8.0 32 0
3.9.0 0 0
TXT
