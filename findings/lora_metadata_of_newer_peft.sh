#!/usr/bin/env bash
# A LoRA that diffusers 0.42.1 saves with its adapter's metadata holds every field of peft 0.21.2's LoraConfig. diffusers
# 0.36.0 with peft 0.18.0 cannot load it: fields that its LoraConfig lacks end in a TypeError. With the metadata cut to r,
# lora_alpha, target_modules, rank_pattern and alpha_pattern it loads.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/v"
python3 -m venv "$dir/old"
for v in v old; do "$dir/$v/bin/pip" install --quiet torch==2.13.0 numpy==1.26.4; done
"$dir/v/bin/pip" install --quiet diffusers==0.42.1 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0
"$dir/old/bin/pip" install --quiet diffusers==0.36.0 transformers==4.57.1 peft==0.18.0 accelerate==1.15.0
cat > "$dir/unet.py" <<'PY'
from diffusers import UNet2DConditionModel

sizes = dict(sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, norm_num_groups=8)
blocks = dict(down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
unet = UNet2DConditionModel(**sizes, **blocks, attention_head_dim=8)
PY
cat > "$dir/save.py" <<'PY'
import sys
from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from unet import unet

unet.add_adapter(LoraConfig(r=4, lora_alpha=2, target_modules=["to_q"]))
layers, fields = get_peft_model_state_dict(unet), unet.peft_config["default"].to_dict()
few = {name: fields[name] for name in ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern")}
for name, metadata in (("all", fields), ("few", few)):
    Loader.save_lora_weights(f"{sys.argv[1]}/{name}", unet_lora_layers=layers, unet_lora_adapter_metadata=metadata)
PY
cat > "$dir/load.py" <<'PY'
import sys
from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader
from unet import unet

for name in ("all", "few"):
    state, alphas, metadata = Loader.lora_state_dict(
        f"{sys.argv[1]}/{name}", weight_name="pytorch_lora_weights.safetensors", unet_config=unet.config,
        local_files_only=True, return_lora_metadata=True,
    )
    try:
        Loader.load_lora_into_unet(state, alphas, unet, metadata=metadata)
        print(name, "scale", *{s for m in unet.modules() if hasattr(m, "scaling") for s in m.scaling.values()})
        unet.unload_lora()
    except TypeError as error:
        print(name, type(error).__name__, str(error).split(".")[0][:60])
PY
PYTHONPATH="$dir" "$dir/v/bin/python" "$dir/save.py" "$dir" 2> /dev/null
seen=$(PYTHONPATH="$dir" "$dir/old/bin/python" "$dir/load.py" "$dir" 2> /dev/null)
echo "$seen"
diff <(echo "$seen") - <<'TXT'
all TypeError `LoraConfig` class could not be instantiated
few scale 0.5
TXT
