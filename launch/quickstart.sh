#!/usr/bin/env bash
# From nothing to a model you can talk to, about 10 minutes on two CPU cores. Finished phases are skipped when run again.
#   bash launch/quickstart.sh
source "$(dirname "$0")/venv.sh"

phase_names=() phase_seconds=()
phase() { # NAME COMMAND …
  local name=$1 start=$SECONDS
  shift
  printf '\n==== %s\n' "$name"
  "$@"
  phase_names+=("$name") phase_seconds+=($((SECONDS - start)))
}

install() {
  install_requirements requirements.txt
  install_cuda
}

demo_corpus() {
  if [ -f data/demo.jsonl ]; then echo "data/demo.jsonl exists"; else "$PYTHON" -m mateconv_jax.data.demo --output data/demo.jsonl; fi
  if [ -f data/demo_dialogues.jsonl ]; then echo "data/demo_dialogues.jsonl exists"; else "$PYTHON" -m mateconv_jax.data.demo --output data/demo_dialogues.jsonl --kind dialogues --documents 8000; fi
}

tokenizer() {
  if [ -d data/demo_tokenizer ]; then echo "data/demo_tokenizer exists"; else "$PYTHON" -m mateconv_jax.tokenizer train --input data/demo.jsonl data/demo_dialogues.jsonl --output data/demo_tokenizer --vocab_size 1024 --max_token_bytes 6; fi
}

prepare() {
  "$PYTHON" -m mateconv_jax.prepare --input data/demo.jsonl --output data/demo --tokenizer data/demo_tokenizer --seq_len 128
  "$PYTHON" -m mateconv_jax.prepare --input data/demo_dialogues.jsonl --output data/demo_dialogues --tokenizer data/demo_tokenizer --seq_len 128
}

score() {
  echo "pretrained:"
  "$PYTHON" -m mateconv_jax.evaluate --model_path=runs/demo --demo
  echo "fine-tuned:"
  "$PYTHON" -m mateconv_jax.evaluate --model_path=runs/demo_chat --demo
}

talk() {
  for prompt in 春天的一个早晨 小红; do
    "$PYTHON" -m mateconv_jax.sample --model_path=runs/demo --prompt="$prompt" --max_new_tokens=60
  done
  echo
  echo "问：你知道法国的首都是哪座城市吗？"
  printf '答：'
  "$PYTHON" -m mateconv_jax.sample --model_path=runs/demo_chat --chat --stream --prompt="你知道法国的首都是哪座城市吗？"
}

phase "install" install
phase "demo corpus" demo_corpus
phase "tokenizer" tokenizer
phase "prepare" prepare
phase "pretrain" "$PYTHON" -m mateconv_jax.train --config=configs/demo.py
phase "fine-tune" "$PYTHON" -m mateconv_jax.train --config=configs/demo_sft.py
phase "score" score
phase "talk" talk

printf '\n==== done\n'
for i in "${!phase_names[@]}"; do printf '%-12s %4d s\n' "${phase_names[i]}" "${phase_seconds[i]}"; done
cat <<END
The pretrained model is runs/demo, the one that answers runs/demo_chat. Keep talking:
  .venv/bin/python -m mateconv_jax.sample --model_path=runs/demo_chat --interactive
END
