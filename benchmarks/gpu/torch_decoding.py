"""transformers' generate with the same model:  python -m benchmarks.gpu.torch_decoding --case '{"static": true, …}'"""

import argparse
import json
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu.peer import serve


def prepare(case: dict):
    model, device = case["model"], "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    config = LlamaConfig(
        hidden_size=model["dim"], num_hidden_layers=model["n_layers"], num_attention_heads=model["n_heads"],
        num_key_value_heads=model["n_kv_heads"], head_dim=model["head_dim"], intermediate_size=model["hidden_dim"],
        vocab_size=model["vocab_size"], max_position_embeddings=model["max_seq_len"], tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    llama = LlamaForCausalLM(config).to(device, torch.bfloat16 if device == "cuda" else torch.float32).eval()
    # With a static cache, transformers compiles the decode step itself (on GPUs).
    options = {"cache_implementation": "static"} if case["static"] else {}
    prompts = {B: torch.randint(3, 256, (B, case["prompt"]), device=device) for B in case["batches"]}

    def generate(B: int) -> float:
        begin = time.perf_counter()
        with torch.inference_mode():
            out = llama.generate(
                prompts[B], attention_mask=torch.ones_like(prompts[B]), max_new_tokens=case["new"], min_new_tokens=case["new"],
                do_sample=True, temperature=0.8, top_k=50, top_p=0.9, **options,
            )  # fmt: skip
        assert out.cpu().shape[1] == case["prompt"] + case["new"]
        return time.perf_counter() - begin

    for B in case["batches"]:
        for _ in range(3 if case["static"] else 1):  # the second call compiles, the third records the CUDA graph
            generate(B)
    return lambda: {str(B): min(generate(B) for _ in range(2)) for B in case["batches"]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", required=True, type=json.loads)
    args = parser.parse_args()
    serve(lambda: prepare(args.case))
