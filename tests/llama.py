"""The outside reference for the model: transformers' LlamaForCausalLM with our weights."""

import shutil
from pathlib import Path

import jax
import numpy as np
import torch
import transformers
from flax import nnx

from mateconv_jax.model.config import ModelConfig
from mateconv_jax.model.transformer import Transformer


def model_config(**changes) -> ModelConfig:
    """A small model in fp32."""
    values = dict(
        dim=64, n_layers=2, n_heads=8, n_kv_heads=4, head_dim=8, hidden_dim=192, vocab_size=96, max_seq_len=256,
        norm_eps=1e-5, rope_theta=10_000.0, rope_factor=1.0, rope_scaling="llama3", rope_low_freq_factor=1.0,
        rope_high_freq_factor=4.0, rope_original_max_seq_len=8192, rope_beta_fast=32.0, rope_beta_slow=1.0, rope_truncate=True,
        rope_attention_factor=None, qk_norm=False, qkv_bias=False, tie_word_embeddings=True, dropout=0.0, use_moe=False,
        n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, norm_topk_prob=True, aux_loss_alpha=0.01, experts="dense",
        attention="blocked", platform="cpu", dtype=np.dtype("float32"),
    )  # fmt: skip
    return ModelConfig(**values | changes)


def peaked_model(max_seq_len: int) -> Transformer:
    """Random weights, large enough for a peaked distribution; for the test datasets' tokenizer of 400."""
    graph, params = nnx.split(Transformer(model_config(vocab_size=400, max_seq_len=max_seq_len), nnx.Rngs(1)))
    return nnx.merge(graph, jax.tree.map(lambda p: 4 * p if p.ndim > 1 else p, params))


def from_ours(model: Transformer) -> transformers.LlamaForCausalLM:
    c = model.c
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=c.dim, num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads,
            head_dim=c.head_dim, intermediate_size=c.hidden_dim, vocab_size=c.vocab_size, rms_norm_eps=c.norm_eps,
            max_position_embeddings=c.max_seq_len, rope_theta=c.rope_theta, tie_word_embeddings=True,
            bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    ).eval()  # fmt: skip
    weights = {"model.embed_tokens.weight": model.embedding_VD, "model.norm.weight": model.norm.scale_D}
    for i, block in enumerate(model.blocks):
        at = f"model.layers.{i}."
        wqkv_JND = np.asarray(block.attention.wqkv_JND[...])
        heads = np.split(wqkv_JND, [c.n_heads, c.n_heads + c.n_kv_heads])
        for name, w_HND in zip(("q", "k", "v"), heads, strict=True):
            weights[at + f"self_attn.{name}_proj.weight"] = w_HND.reshape(-1, c.dim)
        weights[at + "self_attn.o_proj.weight"] = np.asarray(block.attention.wo_DHN[...]).reshape(c.dim, -1)
        gate_FD, up_FD = np.asarray(block.feed_forward.w13_2FD[...])
        weights[at + "mlp.gate_proj.weight"] = gate_FD
        weights[at + "mlp.up_proj.weight"] = up_FD
        weights[at + "mlp.down_proj.weight"] = block.feed_forward.w2_DF
        weights[at + "input_layernorm.weight"] = block.attention_norm.scale_D
        weights[at + "post_attention_layernorm.weight"] = block.ffn_norm.scale_D
    tensors = {name: torch.tensor(np.asarray(w)) for name, w in weights.items()}
    missing, unexpected = llama.load_state_dict(tensors, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected
    llama.tie_weights()
    return llama


def hugging_face_folder(folder: Path, dataset_folder: Path, max_seq_len: int) -> Path:
    """`folder`, made with `peaked_model` and the dataset's tokenizer."""
    shutil.copytree(dataset_folder / "tokenizer", folder)
    from_ours(peaked_model(max_seq_len)).save_pretrained(folder)
    return folder
