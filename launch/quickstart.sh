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
}

talk() {
  for prompt in 春天的一个早晨 小红 法国的首都; do
    "$PYTHON" -m mateconv_jax.sample --model_path=runs/demo --prompt="$prompt" --max_new_tokens=60
  done
  echo
  echo "问：你知道法国的首都是哪座城市吗？"
  printf '答：'
  "$PYTHON" -m mateconv_jax.sample --model_path=runs/demo --chat --stream --prompt="你知道法国的首都是哪座城市吗？"
}

phase "install" install
phase "demo corpus" demo_corpus
phase "prepare" "$PYTHON" -m mateconv_jax.prepare --input data/demo.jsonl --output data/demo --train_tokenizer --vocab_size 1024 --seq_len 128
phase "train" "$PYTHON" -m mateconv_jax.train --config=configs/demo.py
phase "score" "$PYTHON" -m mateconv_jax.evaluate --model_path=runs/demo --demo
phase "talk" talk

printf '\n==== done\n'
for i in "${!phase_names[@]}"; do printf '%-12s %4d s\n' "${phase_names[i]}" "${phase_seconds[i]}"; done
cat <<END
The run folder is runs/demo. Keep talking:
  .venv/bin/python -m mateconv_jax.sample --model_path=runs/demo --chat --prompt="熊猫最爱吃什么？"
END
