#!/usr/bin/env bash
# diffusers 0.42.1 with peft 0.21.2: to import UNet2DConditionModel imports bitsandbytes 0.50.2 where it is installed, and with it
# torch's compiler (torch._inductor), though nothing is quantised or compiled. Seen on 2026-11-29 on a CPU, Python 3.11:
#   without bitsandbytes: bitsandbytes no, torch._inductor.compile_fx no
#   with bitsandbytes: bitsandbytes yes, torch._inductor.compile_fx yes
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
python="$work/venv/bin/python"
"$python" -m pip install --quiet torch==2.13.0
"$python" -m pip install --quiet diffusers==0.42.1 transformers==5.23.0 peft==0.21.2

look='
import sys, diffusers
from diffusers import UNet2DConditionModel
def said(name): return f"{name} " + ("yes" if name in sys.modules else "no")
print("%s bitsandbytes: %s, %s" % (sys.argv[1], said("bitsandbytes"), said("torch._inductor.compile_fx")))
'
cd "$work"
{
  "$python" -c "$look" without
  "$python" -m pip install --quiet bitsandbytes==0.50.2
  "$python" -c "$look" with
} 2> "$work/errors" | tee "$work/seen"
diff "$work/seen" - << 'SEEN'
without bitsandbytes: bitsandbytes no, torch._inductor.compile_fx no
with bitsandbytes: bitsandbytes yes, torch._inductor.compile_fx yes
SEEN
