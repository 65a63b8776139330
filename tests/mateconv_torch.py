"""The outside reference for .pth files: PyTorch MateConv's model, written from its description, with its tensors' names."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from tests import moe_torch


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return self.weight * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x)


def rotate(x_BSHN, turns_SN):
    """Neighbouring features (2j, 2j + 1) as one complex number."""
    z = torch.view_as_complex(x_BSHN.float().reshape(*x_BSHN.shape[:-1], -1, 2))
    return torch.view_as_real(z * turns_SN[:, None]).flatten(3).type_as(x_BSHN)


class Attention(nn.Module):
    def __init__(self, dim, n_heads, n_kv_heads):
        super().__init__()
        self.head_dim = dim // n_heads
        self.wq = nn.Linear(dim, n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(dim, n_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(dim, n_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(n_heads * self.head_dim, dim, bias=False)

    def forward(self, x_BSD, turns_SN):
        q, k, v = (w(x_BSD).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k = rotate(q, turns_SN), rotate(k, turns_SN)
        k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
        scores = torch.einsum("bqhn,bkhn->bhqk", q, k) / self.head_dim**0.5
        scores += torch.full(scores.shape[-2:], float("-inf")).triu(1)
        out = torch.einsum("bhqk,bkhn->bqhn", F.softmax(scores.float(), -1).type_as(q), v)
        return self.wo(out.flatten(2))


class Block(nn.Module):
    def __init__(self, dim, n_heads, n_kv_heads, hidden_dim, eps, experts):
        super().__init__()
        self.attention = Attention(dim, n_heads, n_kv_heads)
        if experts:
            experts = SimpleNamespace(dim=dim, hidden_dim=hidden_dim, aux_loss_alpha=0.01, norm_topk_prob=True, **experts)
            self.feed_forward = moe_torch.MixtureOfExperts(experts)
        else:
            self.feed_forward = moe_torch.FeedForward(dim, hidden_dim)
        self.attention_norm, self.ffn_norm = RMSNorm(dim, eps), RMSNorm(dim, eps)

    def forward(self, x, turns_SN):
        x = x + self.attention(self.attention_norm(x), turns_SN)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    """experts: {"n_routed_experts", "num_experts_per_tok", "n_shared_experts"}, or None."""

    def __init__(
        self,
        dim=64,
        n_layers=2,
        n_heads=16,
        n_kv_heads=8,
        hidden_dim=192,
        vocab_size=96,
        eps=1e-5,
        max_seq_len=512,
        experts=None,
    ):
        super().__init__()
        self.tok_embeddings = nn.Embedding(vocab_size, dim)
        self.layers = nn.ModuleList(Block(dim, n_heads, n_kv_heads, hidden_dim, eps, experts) for _ in range(n_layers))
        self.norm = RMSNorm(dim, eps)
        self.output = nn.Linear(dim, vocab_size, bias=False)
        self.tok_embeddings.weight = self.output.weight
        frequencies = 1.0 / 10_000 ** (torch.arange(0, dim // n_heads, 2).float() / (dim // n_heads))
        angles = torch.outer(torch.arange(max_seq_len).float(), frequencies)
        self.register_buffer("pos_cis", torch.polar(torch.ones_like(angles), angles))

    def forward(self, tokens_BS):
        x = self.tok_embeddings(tokens_BS)
        for layer in self.layers:
            x = layer(x, self.pos_cis[: tokens_BS.shape[1]])
        return self.output(self.norm(x))


def random_model(seed=0, **shape) -> Transformer:
    """Weights large enough for peaked attention, and norms that are not 1."""
    torch.manual_seed(seed)
    model = Transformer(**shape).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * (0.1 if weight.ndim > 1 else 0.3) + (weight.ndim == 1))
    return model
