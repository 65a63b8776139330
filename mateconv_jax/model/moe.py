"""A mixture of experts in place of the feed-forward layer, as in PyTorch MateConv with `LMConfig(use_moe=True)`.

Dimensions in names: B batch, S sequence, N = B S tokens, E routed experts, K chosen per token, M = N K rows sorted by expert,
D model, F feed-forward, L layers. Weights are (out, in), as in PyTorch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mateconv_jax.model.layers import FeedForward, linear

ROUTED = {"w13_E2FD", "w2_EDF"}  # parameters of which a token uses the share K / E


class Routing(NamedTuple):
    """Routing statistics of one layer: fp32 sums over the real tokens, which add up over micro-batches and devices.

    Attributes:
      auxiliary_loss: load-balancing loss, see MixtureOfExperts.
      chosen_E: how often each expert was chosen.
      entropy: of the gate's scores, in nats; ln E per token if they are uniform.
      auxiliary_loss_of_rows: the auxiliary loss in which rows, not tokens, weigh the same; for losses that weigh by row.
    """

    auxiliary_loss: jax.Array
    chosen_E: jax.Array
    entropy: jax.Array
    auxiliary_loss_of_rows: jax.Array

    def means(self, count: jax.Array) -> dict[str, jax.Array]:
        """Metrics of all layers (each array (L, …)) over `count` tokens: train/auxiliary_loss (not included in train/loss) and
        experts/entropy are means per token; experts/most_loaded and experts/least_loaded are the extreme shares an expert has
        of its layer's choices (1 / E when balanced).
        """
        share_LE = self.chosen_E / jnp.maximum(jnp.sum(self.chosen_E, axis=1, keepdims=True), 1)
        return {
            "train/auxiliary_loss": jnp.sum(self.auxiliary_loss) / count,
            "experts/entropy": jnp.mean(self.entropy) / count,
            "experts/most_loaded": jnp.max(share_LE),
            "experts/least_loaded": jnp.min(share_LE),
        }


def choose_backend(name: str) -> str:
    """Resolve "auto" to a backend; any other name is returned as it is. The two backends compute the same function.

    dense: every expert computes every token, with weight 0 where it was not chosen. E / K times the necessary FLOPs, but in
    plain matmuls that are fast on any device and mesh.

    ragged: rows sorted by expert and jax.lax.ragged_dot, which should need no extra FLOPs. As compiled by XLA (jax 0.10.2 and
    0.12, CPU and NVIDIA GPU), it is a masked matmul of every expert with all M rows, K times dense's FLOPs. Forward and
    backward of a layer of configs/moe.py without the shared expert, 16,384 tokens, H100: necessary 0.43 TFLOP, dense 0.85
    TFLOP and 0.9 GB, ragged 1.70 TFLOP and 1.5 GB. So auto is dense until XLA has a grouped matmul (on NVIDIA GPUs cuDNN
    9.22's, behind XLA_FLAGS=--xla_gpu_experimental_use_ragged_dot_fusion=true).
    """
    return "dense" if name == "auto" else name


class MixtureOfExperts(nnx.Module):
    """Top-K routing: a softmax gate chooses K of E experts per token and weights them by their scores; an optional shared
    expert processes every token. There is no capacity limit, so no token is dropped. Gate and softmax are fp32, so that choices
    do not depend on rounding.

    The gate is initialised uniformly within 1 / sqrt(D), as in PyTorch MateConv, which makes its logits equally large at any
    width.

    The auxiliary loss balances the load. It is computed per row (DeepSeek-V2, 2024; PyTorch MateConv's seq_aux): the sum over
    experts of E * share * score, times aux_loss_alpha, where share is the expert's fraction of the row's choices and score its
    mean gate score in the row; balanced experts give aux_loss_alpha. Padding is ignored and a row is weighted by its number of
    real tokens, as in the cross-entropy, so a step's sum does not depend on how rows are split into micro-batches or over
    devices. (PyTorch MateConv has no padding, and then its mean over rows is the same.)
    """

    def __init__(self, c, rngs: nnx.Rngs):
        E, F, D = c.n_routed_experts, c.hidden_dim, c.dim
        init = nnx.initializers.normal(0.02)
        init_gate = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=1, out_axis=0)
        self.gate_ED = nnx.Param(init_gate(rngs.params(), (E, D)))
        w1_EFD = init(rngs.params(), (E, F, D))
        w3_EFD = init(rngs.params(), (E, F, D)) / (2 * c.n_layers) ** 0.5
        self.w13_E2FD = nnx.Param(jnp.stack([w1_EFD, w3_EFD], axis=1))
        self.w2_EDF = nnx.Param(init(rngs.params(), (E, D, F)))
        self.shared_experts = FeedForward(c, rngs) if c.n_shared_experts else None
        self.c = c

    def __call__(self, x_BSD, is_real_BS=None):
        """Returns (output (B, S, D) in x's dtype, Routing). is_real_BS: the tokens counted in Routing; None: all."""
        c = self.c
        B, S, D = x_BSD.shape
        x_ND = x_BSD.reshape(-1, D)
        scores_NE = self.gate_scores(x_ND)
        weights_NK, chosen_NK = jax.lax.top_k(scores_NE, c.num_experts_per_tok)
        if c.norm_topk_prob and c.num_experts_per_tok > 1:
            weights_NK /= jnp.sum(weights_NK, axis=1, keepdims=True) + 1e-20
        experts = {"dense": self._dense, "ragged": self._ragged}[c.experts]
        out_ND = experts(x_ND, weights_NK.astype(x_ND.dtype), chosen_NK)
        if self.shared_experts is not None:
            out_ND += self.shared_experts(x_ND)
        is_real_BS = jnp.ones((B, S), bool) if is_real_BS is None else is_real_BS
        routing = self._routing(scores_NE.reshape(B, S, -1), chosen_NK.reshape(B, S, -1), is_real_BS)
        return out_ND.reshape(B, S, D), routing

    def gate_scores(self, x_ND):
        """Softmax of the gate's logits, fp32 (N, E)."""
        # At default precision, NVIDIA GPUs round fp32 operands to TF32, whose mantissa has 10 bits like float16's.
        logits_NE = jnp.einsum("ND,ED->NE", x_ND.astype(jnp.float32), self.gate_ED[...], precision=jax.lax.Precision.HIGHEST)
        return jax.nn.softmax(logits_NE)

    def _dense(self, x_ND, weights_NK, chosen_NK):
        w13_E2FD, w2_EDF = self.w13_E2FD[...], self.w2_EDF[...].astype(x_ND.dtype)
        E, _, F, D = w13_E2FD.shape
        weights_NE = jnp.einsum("NK,NKE->NE", weights_NK, jax.nn.one_hot(chosen_NK, E, dtype=x_ND.dtype))
        h_NE2F = linear(x_ND, w13_E2FD.reshape(-1, D), self.c.platform).reshape(-1, E, 2, F)
        h_NEF = jax.nn.silu(h_NE2F[:, :, 0]) * h_NE2F[:, :, 1] * weights_NE[..., None]
        if self.c.platform == "cpu" and len(x_ND) <= 32:
            # As in `linear`, and expert by expert, because one matmul over E and F would transpose the weights: 4.4 and 3.4
            # times faster at 1 and 16 rows of the base model.
            return jnp.sum(jax.lax.optimization_barrier(jnp.einsum("EDF,NEF->EDN", w2_EDF, h_NEF)), axis=0).T
        return jnp.einsum("NEF,EDF->ND", h_NEF, w2_EDF)

    def _ragged(self, x_ND, weights_NK, chosen_NK):
        w13_E2FD, w2_EDF = self.w13_E2FD[...].astype(x_ND.dtype), self.w2_EDF[...].astype(x_ND.dtype)
        E, _, F, D = w13_E2FD.shape
        N, K = chosen_NK.shape
        order_M = jnp.argsort(chosen_NK.ravel(), stable=True)
        rows_E = jnp.bincount(chosen_NK.ravel(), length=E)
        # unique_indices makes the gradient a plain scatter instead of atomic additions, whose order changes from run to run.
        x_MD = jnp.repeat(x_ND, K, axis=0).at[order_M].get(unique_indices=True)
        gate_MF, up_MF = jnp.split(_ragged_linear(x_MD, w13_E2FD.reshape(E, 2 * F, D), rows_E), 2, axis=1)
        out_MD = _ragged_linear(jax.nn.silu(gate_MF) * up_MF, w2_EDF, rows_E)
        out_NKD = out_MD.at[jnp.argsort(order_M)].get(unique_indices=True).reshape(N, K, D)
        return jnp.einsum("NK,NKD->ND", weights_NK, out_NKD)

    def _routing(self, scores_BSE, chosen_BSK, is_real_BS) -> Routing:
        c = self.c
        is_real_BS1 = is_real_BS[..., None]
        count_B1 = jnp.sum(is_real_BS1, axis=1)
        at_least_1_B1 = jnp.maximum(count_B1, 1)
        chosen_BSE = jnp.sum(jax.nn.one_hot(chosen_BSK, c.n_routed_experts), axis=2)
        chosen_BE = jnp.sum(chosen_BSE, axis=1, where=is_real_BS1)
        share_BE = chosen_BE / (at_least_1_B1 * c.num_experts_per_tok)
        score_BE = jnp.sum(scores_BSE, axis=1, where=is_real_BS1) / at_least_1_B1
        imbalance_B = c.n_routed_experts * jnp.sum(share_BE * score_BE, axis=1)
        entropy_BS = -jnp.sum(jax.scipy.special.xlogy(scores_BSE, scores_BSE), axis=2)
        return Routing(
            auxiliary_loss=c.aux_loss_alpha * jnp.sum(imbalance_B * count_B1[:, 0]),
            chosen_E=jnp.sum(chosen_BE, axis=0),
            entropy=jnp.sum(jax.lax.stop_gradient(entropy_BS), where=is_real_BS),
            auxiliary_loss_of_rows=c.aux_loss_alpha * jnp.sum(imbalance_B),
        )


_ROWS_BY_EXPERT = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(([1], [2]), ([], [])), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
)


def _ragged_linear(x_MI, w_EOI, rows_E):
    """x w_e^T for each expert e's rows_E[e] consecutive rows: (M, I) to (M, O)."""
    return jax.lax.ragged_dot_general(x_MI, w_EOI, rows_E, _ROWS_BY_EXPERT)
