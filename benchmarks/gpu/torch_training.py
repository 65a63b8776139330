"""The same model and training step in plain PyTorch, as in MiniMind or nanochat:
python -m benchmarks.gpu.torch_training --case '{"rows": 32, …}'

scaled_dot_product_attention, F.rms_norm, bfloat16 autocast, fused AdamW, clip_grad_norm_, torch.compile of the whole model.
"""

import argparse
import json
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.gpu.peer import serve
from benchmarks.gpu.timing import group_of


class Block(nn.Module):
    def __init__(self, dim, n_heads, n_kv_heads, head_dim, hidden_dim, norm_eps, **_):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim, self.eps = n_heads, n_kv_heads, head_dim, norm_eps
        self.attention_norm, self.ffn_norm = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))
        self.wq = nn.Linear(dim, n_heads * head_dim, bias=False)
        self.wk = nn.Linear(dim, n_kv_heads * head_dim, bias=False)
        self.wv = nn.Linear(dim, n_kv_heads * head_dim, bias=False)
        self.wo = nn.Linear(n_heads * head_dim, dim, bias=False)
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x, cos, sin):
        B, S, D = x.shape
        h = F.rms_norm(x, (D,), self.attention_norm, self.eps)
        q = rope(self.wq(h).view(B, S, self.n_heads, self.head_dim), cos, sin).transpose(1, 2)
        k = rope(self.wk(h).view(B, S, self.n_kv_heads, self.head_dim), cos, sin).transpose(1, 2)
        v = self.wv(h).view(B, S, self.n_kv_heads, self.head_dim).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.n_heads != self.n_kv_heads)
        x = x + self.wo(out.transpose(1, 2).reshape(B, S, -1))
        h = F.rms_norm(x, (D,), self.ffn_norm, self.eps)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


def rope(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).type_as(x)


class Llama(nn.Module):
    def __init__(self, model: dict, seq_len: int):
        super().__init__()
        dim, self.eps = model["dim"], model["norm_eps"]
        self.embedding = nn.Embedding(model["vocab_size"], dim)
        self.blocks = nn.ModuleList(Block(**model) for _ in range(model["n_layers"]))
        self.norm = nn.Parameter(torch.ones(dim))
        frequency = model["rope_theta"] ** (-torch.arange(0, model["head_dim"], 2) / model["head_dim"])
        angles = torch.outer(torch.arange(seq_len).float(), frequency)[None, :, None]
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, tokens, targets):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        x = F.rms_norm(x, (x.shape[-1],), self.norm, self.eps)
        logits = F.linear(x, self.embedding.weight)  # tied
        return F.cross_entropy(logits.float().view(-1, logits.shape[-1]), targets.reshape(-1))


def prepare(case: dict):
    """Compile by running two steps; returns a function that measures."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Llama(case["model"], case["seq_len"]).to(device)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), fused=True)
    compiled = torch.compile(model) if device == "cuda" else torch.compile(model, backend="eager")
    tokens = torch.randint(3, 256, (case["rows"], case["seq_len"] + 1), device=device)

    def step():
        with torch.autocast(device, torch.bfloat16):
            loss = compiled(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return loss

    for _ in range(2):
        step()
    synchronize(device)
    if device == "cuda":
        torch.cuda.empty_cache()  # leave the memory to the other side until it is measured
        torch.cuda.reset_peak_memory_stats()
    return lambda: measure(step, device, case["seconds"])


def measure(step, device: str, seconds: float) -> dict:
    windows = []
    for window in range(100):
        begin = time.perf_counter()
        for _ in range(5):
            step()
        synchronize(device)
        if window >= 2:
            windows.append((time.perf_counter() - begin) / 5)
        if 5 * sum(windows) > seconds and len(windows) >= 3:
            break
    result = {"seconds": statistics.median(windows), "loss": step().item()}
    if device == "cuda":
        result["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        result["kernels"] = kernels(step)
    return result


def kernels(step, steps: int = 3) -> dict[str, dict[str, float]]:
    """{group: {"ms", "launches"} per step}"""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    groups: dict[str, dict[str, float]] = {}
    for event in profile.key_averages():
        if event.self_device_time_total:
            group = groups.setdefault(group_of(event.key), {"ms": 0.0, "launches": 0.0})
            group["ms"] += event.self_device_time_total / 1e3 / steps
            group["launches"] += event.count / steps
    return dict(sorted(groups.items(), key=lambda item: -item[1]["ms"]))


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", required=True, type=json.loads)
    args = parser.parse_args()
    serve(lambda: prepare(args.case))
