#!/usr/bin/env bash
# transformers 5.23.0 saves a CLIPTextModel without the prefix text_model. in its tensors' names (since 5.6).
# transformers 4.57.1 reads such a folder without an error: all tensors are "not used", all weights are drawn at random.
# The other way round, 5.23.0 reads what 4.57.1 saved. Seen: 36 tensors missing, 36 unexpected; 0 and 0.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
for version in 5.23.0 4.57.1; do
    python3 -m venv "$dir/$version"
    "$dir/$version/bin/pip" install --quiet torch==2.13.0 numpy==1.26.4
    "$dir/$version/bin/pip" install --quiet "transformers==$version"
done
cat > "$dir/save.py" <<'PY'
import sys
from transformers import CLIPTextConfig, CLIPTextModel

sizes = dict(vocab_size=99, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
CLIPTextModel(CLIPTextConfig(**sizes, bos_token_id=97, eos_token_id=98, pad_token_id=98)).save_pretrained(sys.argv[1])
PY
cat > "$dir/load.py" <<'PY'
import sys
from transformers import CLIPTextModel, __version__

model, found = CLIPTextModel.from_pretrained(sys.argv[1], output_loading_info=True)
print(__version__, "reads", sys.argv[2], "missing", len(found["missing_keys"]), "unexpected", len(found["unexpected_keys"]))
PY
for version in 5.23.0 4.57.1; do
    "$dir/$version/bin/python" "$dir/save.py" "$dir/saved-$version" 2> /dev/null
done
seen=$(
    "$dir/4.57.1/bin/python" "$dir/load.py" "$dir/saved-5.23.0" 5.23.0 2> /dev/null
    "$dir/5.23.0/bin/python" "$dir/load.py" "$dir/saved-4.57.1" 4.57.1 2> /dev/null
)
echo "$seen"
diff <(echo "$seen") - <<'TXT'
4.57.1 reads 5.23.0 missing 36 unexpected 36
5.23.0 reads 4.57.1 missing 0 unexpected 0
TXT
