"""The model card, README.md of an exported model: architecture, training data, validation score and usage."""

import json
from pathlib import Path

from mateconv_jax import run_folder
from mateconv_jax.interop import weight_mapping
from mateconv_jax.interop.stored_model import StoredModel

ABOUT = """\
---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A language model with {n_parameters:,} parameters, exported by MateConv-JAX.

## Architecture

A LLaMA-style decoder (`{architecture}` in transformers): {layers} of width {dim} with {feed_forward} {hidden_dim};
{n_heads} query and {n_kv_heads} key/value heads of size {head_dim}{qk_norm}; rotary position embedding
with base {rope_theta:g}{scaling}; a vocabulary of {vocab_size:,} tokens, output layer {tied} to the embedding; a context of
{max_seq_len:,} tokens.
"""

USE = """\
## Use

{bos_note}\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "{folder}"  # the folder with this file
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)

inputs = tokenizer({prompt}, return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0], skip_special_tokens=True))
{chat}```

Serve it with an OpenAI-compatible API, with vLLM or SGLang:

```bash
vllm serve {folder}
python -m sglang.launch_server --model-path {folder}
```
"""

CHAT = """
messages = [{"role": "user", "content": "你好"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=100)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""


def text(model: StoredModel, architecture: str, folder: str) -> str:
    """The model card in Markdown.

    Args:
      model: with a tokenizer. If it is a run, a section on its training is added, from its config, metrics and data statistics.
      architecture: the transformers class.
      folder: the exported folder's name.
    """
    c, tokenizer = model.config.model, model.tokenizer
    assert tokenizer is not None
    kind = {"llama3": "Llama 3's scaling", "yarn": "YaRN's scaling"}[c.rope_scaling]
    scaling = f", {kind} by {c.rope_factor:g} beyond {c.rope_original_max_seq_len:,} positions"
    shared = " and a shared expert" * c.n_shared_experts
    experts = f"{c.num_experts_per_tok} of {c.n_routed_experts} experts per token{shared}, SwiGLUs of size"
    about = ABOUT.format(
        **{key: value for key, value in c.items() if key not in ("qk_norm",)},
        name=folder,
        layers=f"{c.n_layers} layer" + "s" * (c.n_layers > 1),
        architecture=architecture,
        n_parameters=weight_mapping.n_parameters(c),
        feed_forward=experts if c.use_moe else "a SwiGLU of size",
        qk_norm=", with QK norm" if c.qk_norm else "",
        scaling=scaling if c.rope_factor != 1 else "",
        tied="tied" if c.tie_word_embeddings else "not tied",
    )
    bos = tokenizer.bos_token
    use = USE.format(
        folder=folder,
        bos_note=f"Every prompt must begin with `{bos}`, like every document; the chat template adds it.\n\n" if bos else "",
        prompt='tokenizer.bos_token + "中国"' if bos else '"中国"',
        chat=CHAT if tokenizer.chat_template else "",
    )
    return "\n".join([about, *_training(model), use])


def _training(model: StoredModel) -> list[str]:
    """The lines of the training section; none for a model that is not a trained run."""
    if not model.step or model.run is None:
        return []
    config = model.config
    rows_per_step = config.training.batch_size * config.training.accumulation_steps
    progress = run_folder.read_progress(run_folder.find_checkpoint(model.path, "--from").path)
    rows = progress.get("rows") or model.step * rows_per_step  # older checkpoints do not say
    n_tokens = rows * config.data.seq_len
    size = f" of {rows_per_step:,} rows" if rows == model.step * rows_per_step else f", {rows:,} rows"  # the batch may change
    lines = [
        "## Training",
        "",
        f"- {n_tokens:,} tokens: {model.step:,} steps{size} of {config.data.seq_len:,} tokens",
    ]
    if (bits := _bits_per_byte(model.run / "metrics.jsonl", model.step)) is not None:
        lines.append(f"- validation: {bits:.4f} bits per byte")
    statistics = run_folder.read_data_statistics(model.run)
    if statistics:
        lines.append(
            f"- data: {statistics['documents']:,} documents, {statistics['characters']:,} characters, "
            f"{statistics['tokens']:,} tokens"
        )
        scripts = [f"{script} {share:.1%}" for script, share in _shares(statistics["characters_by_script"])]
        lines += [f"- characters: {', '.join(scripts)}"] if scripts else []
        if statistics["rejects"]:
            lines.append("- rejected: " + ", ".join(f"{n:,} ({rule})" for rule, n in statistics["rejects"].items()))
    return [*lines, ""]


def _shares(counts: dict[str, int]) -> list[tuple[str, float]]:
    total = sum(counts.values())
    return [(name, n / total) for name, n in counts.items() if n >= total / 1000]


def _bits_per_byte(path: Path, step: int) -> float | None:
    """Of the last evaluation at or before `step`; None if there was none."""
    found = None
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            metrics = json.loads(line)
        except ValueError:  # the last line may be incomplete, and others garbled by a power loss
            continue
        if isinstance(metrics, dict) and metrics.get("step", step + 1) <= step:
            found = metrics.get("val/bits_per_byte", found)
    return found
