#!/bin/bash
# tokenizers 0.23.3 and transformers 5.23.0: an added token behind a gap gets another id than the file says.
#
# tokenizer.json gives every added token its id. For one that is not in the model's vocabulary the library does not read
# it: such tokens get the next free ids, in the order of the file, without a warning. So where ids are left out, for
# instance since a vocabulary was padded to a multiple of 64 before tokens were added, a text gets ids that the model
# was never trained on, and a saved copy of the file says the new ids. added_tokens.json, which stands beside vocab.json
# and merges.txt, is read likewise.
#
# Output seen:
#   the file says                       <new> 300
#   tokenizers, Tokenizer.from_file     <new> 257   encodes 'a<new>' as [65, 257]
#   transformers, tokenizer.json        <new> 257   encodes 'a<new>' as [65, 257]
#   transformers, added_tokens.json     <new> 257   encodes 'a<new>' as [65, 257]
#   saved again, the file says          <new> 257
#
# Exits 1 if that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check tokenizers==0.23.3 transformers==5.23.0
cd "$folder"
export HF_HUB_OFFLINE=1
venv/bin/python - <<'END'
import json
import os
import sys

import transformers
from tokenizers import ByteLevelBPETokenizer, Tokenizer

# the 256 bytes, and one token that ends a text
tokenizer = ByteLevelBPETokenizer()
tokenizer.train_from_iterator([], vocab_size=257, special_tokens=["<|endoftext|>"], show_progress=False)
tokenizer.add_tokens(["<new>"])
tokenizer.save("whole.json")
with open("whole.json") as f:
    whole = json.load(f)
whole["added_tokens"][-1]["id"] = 300
with open("whole.json", "w") as f:
    json.dump(whole, f)
print("the file says                       <new> 300")

os.mkdir("two")
tokenizer.save_model("two")
for name, about in (("added_tokens", {"<new>": 300}), ("config", {"model_type": "gpt2"})):
    with open(f"two/{name}.json", "w") as f:
        json.dump(about, f)

own = Tokenizer.from_file("whole.json")
fast = transformers.PreTrainedTokenizerFast(tokenizer_file="whole.json")
two = transformers.AutoTokenizer.from_pretrained("two")
found = {
    "tokenizers, Tokenizer.from_file ": (own.token_to_id("<new>"), own.encode("a<new>").ids),
    "transformers, tokenizer.json    ": (fast.convert_tokens_to_ids("<new>"), fast("a<new>").input_ids),
    "transformers, added_tokens.json ": (two.convert_tokens_to_ids("<new>"), two("a<new>").input_ids),
}
for name, (i, ids) in found.items():
    print(f"{name}    <new> {i}   encodes 'a<new>' as {ids}")
own.save("again.json")
with open("again.json") as f:
    again = json.load(f)["added_tokens"][-1]["id"]
print(f"saved again, the file says          <new> {again}")
sys.exit(not (again == 257 and all(i == ids[-1] == 257 for i, ids in found.values())))
END
