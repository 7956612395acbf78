#!/usr/bin/env bash
# schedulefree 1.4.1 on torch 2.13.0 (CPU): AdamWScheduleFree.eval() and train(), which have to be called around every
# validation and save, write the weights' other point into the weights and compute the first one back, in the weights'
# own type. So looking at a model moves its training: after eval(); train() some float32 weights differ in their last
# bits, in bfloat16 by a step, and runs with and without a validation part. Seen, of 10,000 weights after 5 steps: about
# 1 % differ in either type, none before the first step.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/v"
"$dir/v/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$dir/v/bin/pip" install --quiet schedulefree==1.4.1
cat > "$dir/run.py" <<'PY'
import schedulefree
import torch

for dtype in (torch.float32, torch.bfloat16):
    torch.manual_seed(0)
    weights = torch.nn.Parameter(torch.randn(10_000).to(dtype))
    optimizer = schedulefree.AdamWScheduleFree([weights], lr=1e-2)
    optimizer.train()
    for steps in range(6):
        before = weights.detach().clone()
        optimizer.eval()
        optimizer.train()
        if steps in (0, 5):
            print(dtype, "steps", steps, "differ", int((weights.detach() != before).sum()), "of", len(before))
        (weights**2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
PY
seen=$("$dir/v/bin/python" "$dir/run.py" 2> "$dir/said") || { cat "$dir/said"; exit 1; }
echo "$seen"
[ "$(grep -c 'steps 0 differ 0 of' <<< "$seen")" = 2 ]
[ "$(grep 'steps 5' <<< "$seen" | grep -vc 'differ 0 of')" = 2 ]
