#!/usr/bin/env bash
# bitsandbytes 0.49.2 imports on a machine without a GPU, and its AdamW8bit takes CPU parameters, but the first step
# raises: it has kernels for GPUs only. 0.50.0 has them for a CPU (and says that its paged optimizers are not paged there).
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/v"
"$dir/v/bin/pip" install --quiet torch==2.13.0 numpy==1.26.4 packaging
cat > "$dir/run.py" <<'PY'
import bitsandbytes, torch

weight = torch.nn.Parameter(torch.ones(8192))
weight.grad = torch.ones(8192)
optimizer = bitsandbytes.optim.AdamW8bit([weight], lr=0.01)
try:
    optimizer.step()
    seen = f"steps to {weight[0].item():.3f}, state {optimizer.state[weight]['state1'].dtype}"
except (RuntimeError, AttributeError) as error:
    seen = f"{type(error).__name__}: {str(error)[:50]}"
print(bitsandbytes.__version__, seen)
PY
seen=$(
    for version in 0.49.2 0.50.0; do
        "$dir/v/bin/pip" install --quiet --no-deps "bitsandbytes==$version" >&2
        CUDA_VISIBLE_DEVICES= "$dir/v/bin/python" "$dir/run.py" 2> /dev/null
    done
)
echo "$seen"
diff <(echo "$seen") - <<'TXT'
0.49.2 RuntimeError: All input tensors need to be on the same GPU, but 
0.50.0 steps to 0.990, state torch.uint8
TXT
