#!/usr/bin/env bash
# diffusers 0.42.1, DDIMScheduler: step() goes from t to t - 1000 // steps whatever the spacing. With timestep_spacing
# linspace the network is next told another timestep than the one the sample was brought to (83 apart at 4 steps, 3 at 20);
# with leading none. And with trailing some numbers of steps give one timestep more than asked for, the last of them -1
# (62 of the numbers up to 999; 61 is the first).
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/v"
"$dir/v/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$dir/v/bin/pip" install --quiet diffusers==0.42.1
cat > "$dir/run.py" <<'PY'
import torch
from diffusers import DDIMScheduler


def scheduler(spacing, steps):
    made = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing=spacing)
    made.set_timesteps(steps)
    return made


def landed(made, t):
    """The timestep whose noise level the step from t ends at: with a clean image of 0 and epsilon 1, sample is sigma."""
    alpha = made.alphas_cumprod.double()
    sample = torch.full((1, 1), (1 - alpha[t]).sqrt().item(), dtype=torch.float64)
    sigma = made.step(torch.ones(1, 1, dtype=torch.float64), t, sample).prev_sample.item()
    return int(((1 - alpha).sqrt() - sigma).abs().argmin())


for spacing, steps in (("leading", 20), ("linspace", 20), ("linspace", 4)):
    made = scheduler(spacing, steps)
    now, then = made.timesteps[:2].tolist()
    print(spacing, steps, "told", now, "landed", landed(made, now), "told next", then)
longer = [s for s in range(1, 1000) if len(scheduler("trailing", s).timesteps) != s]
print("trailing", len(longer), longer[0], scheduler("trailing", longer[0]).timesteps[-2:].tolist())
PY
seen=$("$dir/v/bin/python" "$dir/run.py" 2> /dev/null)
echo "$seen"
diff <(echo "$seen") - <<'TXT'
leading 20 told 951 landed 901 told next 901
linspace 20 told 999 landed 949 told next 946
linspace 4 told 999 landed 749 told next 666
trailing 62 61 [15, -1]
TXT
