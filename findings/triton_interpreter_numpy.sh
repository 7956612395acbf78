#!/usr/bin/env bash
# Triton 3.6's interpreter (TRITON_INTERPRET=1) cannot loop to a number given at launch beside numpy 2.4 and newer: it turns an array of
# one element into an int, which they refuse. Beside numpy 2.3 it can, and Triton 3.7 can beside both.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
python="$work/venv/bin/python"
"$python" -m pip install --quiet torch==2.13.0
cat > "$work/loop.py" <<'PY'
import torch, triton, triton.language as tl


@triton.jit
def count(out, n):
    total = 0
    for k in range(n):
        total += k
    tl.store(out, total)


out = torch.zeros(1, dtype=torch.int32)
count[(1,)](out, 4)
print(int(out))
PY
for versions in "3.6.0 2.4.6" "3.6.0 2.3.5" "3.7.0 2.4.6"; do
    read -r triton numpy <<< "$versions"
    "$python" -m pip install --quiet --no-deps --upgrade --target "$work/$triton-$numpy" "triton==$triton" "numpy==$numpy"
    said=$(TRITON_INTERPRET=1 PYTHONPATH="$work/$triton-$numpy" "$python" "$work/loop.py" 2>&1 | tail -n 1 || true)
    echo "Triton $triton, numpy $numpy: $said"
    case "$versions" in
        "3.6.0 2.4.6") [[ "$said" == *"only 0-dimensional arrays"* ]] ;;
        *) [[ "$said" == 6 ]] ;;
    esac
done
