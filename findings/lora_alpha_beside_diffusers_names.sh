#!/usr/bin/env bash
# diffusers 0.42.1 takes .alpha tensors of a LoRA file from kohya's names (lora_unet_*.alpha). Beside its own names, old
# (unet.*.lora.down.weight) or PEFT's (unet.*.lora_A.weight), it passes them over without a word and takes alpha = rank:
# the same matrices and alphas are then drawn rank / alpha times as strong. Seen, rank 4, alpha 1: scale 0.25, 1, 1.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/v"
"$dir/v/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$dir/v/bin/pip" install --quiet diffusers==0.42.1 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0
cat > "$dir/run.py" <<'PY'
import sys
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader
from safetensors.torch import save_file

sizes = dict(sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, norm_num_groups=8)
blocks = dict(down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
unet = UNet2DConditionModel(**sizes, **blocks, attention_head_dim=8)
styles = {
    "kohya": (lambda n: "lora_unet_" + n.replace(".", "_"), "lora_down", "lora_up"),
    "diffusers": (lambda n: f"unet.{n}", "lora.down", "lora.up"),
    "PEFT": (lambda n: f"unet.{n}", "lora_A", "lora_B"),
}
for style, (name, down, up) in styles.items():
    tensors = {}
    for layer, module in list(unet.named_modules()):
        if layer.endswith("to_q"):
            tensors[f"{name(layer)}.{down}.weight"] = torch.randn(4, module.in_features)
            tensors[f"{name(layer)}.{up}.weight"] = torch.randn(module.out_features, 4)
            tensors[f"{name(layer)}.alpha"] = torch.tensor(1.0)
    save_file(tensors, f"{sys.argv[1]}/{style}.safetensors")
    state, alphas = Loader.lora_state_dict(f"{sys.argv[1]}/{style}.safetensors", unet_config=unet.config)
    Loader.load_lora_into_unet(state, alphas, unet)
    scales = [s for m in unet.modules() if hasattr(m, "scaling") for s in m.scaling.values()]
    print(style, "layers", len(scales), "scale", *sorted(set(scales)))
    unet.unload_lora()
PY
seen=$("$dir/v/bin/python" "$dir/run.py" "$dir" 2> /dev/null | grep layers)
echo "$seen"
diff <(echo "$seen") - <<'TXT'
kohya layers 8 scale 0.25
diffusers layers 8 scale 1.0
PEFT layers 8 scale 1.0
TXT
