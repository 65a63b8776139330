"""The outside reference for mixtures of experts: PyTorch MateConv's layer, written from its description with obvious loops."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class MixtureOfExperts(nn.Module):
    """`forward` leaves the auxiliary loss in `aux_loss`."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.gate = nn.Linear(c.dim, c.n_routed_experts, bias=False)
        self.experts = nn.ModuleList([FeedForward(c.dim, c.hidden_dim) for _ in range(c.n_routed_experts)])
        self.shared_experts = FeedForward(c.dim, c.hidden_dim) if c.n_shared_experts else None

    def forward(self, x):
        c, rows = self.c, []
        aux_losses = []
        for row in x:
            scores = self.gate(row).softmax(dim=-1)
            chosen_by_expert = torch.zeros(c.n_routed_experts)
            outputs = []
            for token, score in zip(row, scores, strict=True):
                weights, chosen = torch.topk(score, c.num_experts_per_tok)
                if c.num_experts_per_tok > 1 and c.norm_topk_prob:
                    weights = weights / (weights.sum() + 1e-20)
                output = sum(weight * self.experts[e](token) for weight, e in zip(weights, chosen.tolist(), strict=True))
                if self.shared_experts is not None:
                    output = output + self.shared_experts(token)
                outputs.append(output)
                for e in chosen.tolist():
                    chosen_by_expert[e] += 1
            load = chosen_by_expert / (len(row) * c.num_experts_per_tok / c.n_routed_experts)
            aux_losses.append((load * scores.mean(dim=0)).sum())
            rows.append(torch.stack(outputs))
        self.aux_loss = c.aux_loss_alpha * torch.stack(aux_losses).mean()
        return torch.stack(rows)


def tensors(feed_forward: dict) -> dict[str, torch.Tensor]:
    """Our layer's parameters, or their gradients, under the names of the reference's."""

    def parts(at, w13_2FD, w2_DF):
        return {f"{at}.w1.weight": w13_2FD[0], f"{at}.w3.weight": w13_2FD[1], f"{at}.w2.weight": w2_DF}

    named = {"gate.weight": feed_forward["gate_ED"]}
    for e, (w13_2FD, w2_DF) in enumerate(zip(feed_forward["w13_E2FD"], feed_forward["w2_EDF"], strict=True)):
        named |= parts(f"experts.{e}", w13_2FD, w2_DF)
    if "shared_experts" in feed_forward:
        named |= parts("shared_experts", feed_forward["shared_experts"]["w13_2FD"], feed_forward["shared_experts"]["w2_DF"])
    return {name: torch.tensor(np.asarray(array)) for name, array in named.items()}


def from_ours(c, feed_forward: dict) -> MixtureOfExperts:
    reference = MixtureOfExperts(c)
    reference.load_state_dict(tensors(feed_forward))
    return reference
