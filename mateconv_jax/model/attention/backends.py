"""Causal grouped-query attention: interchangeable backends and the choice between them.

A backend is a module with `refusal(request)`, the reason it does not support a request or None, and `attention`, the call.
"""

from mateconv_jax.errors import UserError
from mateconv_jax.model.attention import blocked, cudnn, xla
from mateconv_jax.model.attention.request import Request

BACKENDS = {"cudnn": cudnn, "blocked": blocked, "xla": xla}
FASTEST_FIRST = {"gpu": ("cudnn", "xla"), "cpu": ("blocked", "xla")}  # any other device: xla


def choose(name: str, request: Request) -> tuple[str, list[str]]:
    """Choose a backend: the named one, or for "auto" the fastest that supports the request.

    Returns:
      (backend, why faster ones were passed over, each as "NAME: reason")

    Raises:
      UserError: the named backend does not support the request. There is no silent fallback.
    """
    if name != "auto":
        if reason := BACKENDS[name].refusal(request):
            *others, last = ["auto", *(other for other in BACKENDS if BACKENDS[other].refusal(request) is None)]
            raise UserError(f"model.attention: {name} is unavailable: it {reason} (expected {', '.join(others)} or {last})")
        return name, []
    passed_over = []
    for candidate in FASTEST_FIRST.get(request.device.platform, ("xla",)):
        reason = BACKENDS[candidate].refusal(request)
        if reason is None:
            return candidate, passed_over
        passed_over.append(f"{candidate}: {reason}")
    raise AssertionError("xla supports every request")


def causal_attention(q_BSHN, k_BSKN, v_BSKN, backend: str, documents_BS=None, dropout: float = 0.0, key_B=None):
    """softmax(q k^T / sqrt(N), causal) v with grouped queries: query head h reads key/value head h // (H / K).

    Args:
      q_BSHN, k_BSKN, v_BSKN: the same dtype, rotary embedding applied.
      backend: from `choose`.
      documents_BS: int32; a query attends only to keys of its own document. None: to all keys before it.
      dropout: fraction of the attention weights to drop.
      key_B: one key per row; None: no dropout.

    Returns:
      (B, S, H, N) in the same dtype; the softmax is fp32.
    """
    return BACKENDS[backend].attention(q_BSHN, k_BSKN, v_BSKN, documents_BS, dropout, key_B)
