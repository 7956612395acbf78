#!/usr/bin/env bash
# A CLIP tokenizer that transformers 5.23.0 saves is tokenizer.json and tokenizer_config.json. transformers 4.57.1 has two
# classes: CLIPTokenizerFast reads them; CLIPTokenizer, which model_index.json of a pipeline names and diffusers therefore
# loads, wants vocab.json and merges.txt, and ends in an ImportError about protobuf, which has nothing to do with it.
# With the two files beside it (the tokenizers package writes them) it loads, and gives the same ids.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
for version in 5.23.0 4.57.1; do
    python3 -m venv "$dir/$version"
    "$dir/$version/bin/pip" install --quiet torch==2.13.0 numpy==1.26.4
    "$dir/$version/bin/pip" install --quiet "transformers==$version"
done
cat > "$dir/save.py" <<'PY'
import os, sys
from transformers import CLIPTokenizer

letters = [chr(c) for c in range(33, 127)]
words = [*letters, *(f"{c}</w>" for c in letters), "re", "red</w>", "<|startoftext|>", "<|endoftext|>"]
tokenizer = CLIPTokenizer(
    vocab={w: i for i, w in enumerate(words)}, merges=[("r", "e"), ("re", "d</w>")], model_max_length=8
)
tokenizer.save_pretrained(f"{sys.argv[1]}/plain")
tokenizer.save_pretrained(f"{sys.argv[1]}/more")
tokenizer.backend_tokenizer.model.save(f"{sys.argv[1]}/more")
print("saved", *sorted(os.listdir(f"{sys.argv[1]}/plain")), tokenizer("a red dot").input_ids)
PY
cat > "$dir/load.py" <<'PY'
import sys
from transformers import CLIPTokenizer, CLIPTokenizerFast

for cls in (CLIPTokenizerFast, CLIPTokenizer):
    for folder in ("plain", "more"):
        try:
            print(cls.__name__, folder, cls.from_pretrained(f"{sys.argv[1]}/{folder}")("a red dot").input_ids)
        except Exception as error:
            print(cls.__name__, folder, type(error).__name__, "protobuf" in str(error))
PY
mkdir "$dir/saved"
seen=$(
    "$dir/5.23.0/bin/python" "$dir/save.py" "$dir/saved" 2> /dev/null
    "$dir/4.57.1/bin/python" "$dir/load.py" "$dir/saved" 2> /dev/null
)
echo "$seen"
diff <(echo "$seen") - <<'TXT'
saved tokenizer.json tokenizer_config.json [190, 158, 189, 67, 78, 177, 191]
CLIPTokenizerFast plain [190, 158, 189, 67, 78, 177, 191]
CLIPTokenizerFast more [190, 158, 189, 67, 78, 177, 191]
CLIPTokenizer plain ImportError True
CLIPTokenizer more [190, 158, 189, 67, 78, 177, 191]
TXT
