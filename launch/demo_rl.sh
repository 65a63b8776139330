#!/usr/bin/env bash
# Additions: fine-tuned until about a third is right, then taught by reward alone; about five minutes on two CPU cores. Ends with
# one JSON line: the shares of held-out additions that are right before and after, and the seconds of both. Finished phases are
# skipped when run again.
#   bash launch/demo_rl.sh
source "$(dirname "$0")/venv.sh"

phase() { # NAME COMMAND …
  printf '\n==== %s\n' "$1" >&2
  "${@:2}" >&2
}

data() {
  if [ -f data/demo_sums/held_out.jsonl ]; then echo "data/demo_sums exists"; else "$PYTHON" -m mateconv_jax.data.demo_sums --output data/demo_sums; fi
  if [ -d data/demo_sums/tokenizer ]; then echo "data/demo_sums/tokenizer exists"; else "$PYTHON" -m mateconv_jax.tokenizer train --input data/demo_sums/dialogues.jsonl --output data/demo_sums/tokenizer --vocab_size 300 --split_digits; fi
  "$PYTHON" -m mateconv_jax.prepare --input data/demo_sums/dialogues.jsonl --output data/demo_sums/dataset --tokenizer data/demo_sums/tokenizer --seq_len 128
}

right() { # RUN: the share of held-out additions that it answers rightly, as JSON
  "$PYTHON" -m mateconv_jax.evaluate --model_path="$1" --prompts=data/demo_sums/held_out.jsonl --reward mateconv_jax.rewards:number_match --max_new_tokens=12 --json
}

phase "install" install_requirements requirements.txt
start=$SECONDS
phase "data" data
phase "fine-tune" "$PYTHON" -m mateconv_jax.train --config=configs/demo_sums.py
before=$(right runs/demo_sums)
phase "reward" "$PYTHON" -m mateconv_jax.train --config=configs/demo_rl.py
after=$(right runs/demo_rl)
seconds=$((SECONDS - start))
phase "curves" "$PYTHON" -m mateconv_jax.report runs/demo_rl --output runs/demo_rl/curves.png
"$PYTHON" - "$before" "$after" "$seconds" <<'END'
import json, sys
before, after = (json.loads(score)["number_match"] for score in sys.argv[1:3])
print(json.dumps({"before": round(before, 3), "after": round(after, 3), "seconds": int(sys.argv[3])}))
END
