"""Causal grouped-query attention: backends with one meaning.

A backend is a module with `refusal(request)`, which says why it cannot serve or None, and `attention`, the call.
"""

from mateconv_jax.errors import UserError
from mateconv_jax.model.attention import blocked, cudnn, xla
from mateconv_jax.model.attention.request import Request

BACKENDS = {"cudnn": cudnn, "blocked": blocked, "xla": xla}
FASTEST_FIRST = {"gpu": ("cudnn", "xla"), "cpu": ("blocked", "xla")}  # any other device: xla


def choose(name: str, request: Request) -> tuple[str, list[str]]:
    """The backend that serves `name`, "auto" or a backend's own name, and why faster ones do not: "NAME: reason".

    Raises:
      UserError: the backend asked for cannot serve. Nothing falls back silently.
    """
    if name != "auto":
        if reason := BACKENDS[name].refusal(request):
            *others, last = ["auto", *(other for other in BACKENDS if BACKENDS[other].refusal(request) is None)]
            raise UserError(f"model.attention: {name} cannot serve: {reason} (expected {', '.join(others)} or {last})")
        return name, []
    passed_over = []
    for candidate in FASTEST_FIRST.get(request.device.platform, ("xla",)):
        reason = BACKENDS[candidate].refusal(request)
        if reason is None:
            return candidate, passed_over
        passed_over.append(f"{candidate}: {reason}")
    raise AssertionError("xla serves everything")


def causal_attention(q_BSHN, k_BSKN, v_BSKN, backend: str, documents_BS=None, dropout: float = 0.0, key_B=None):
    """softmax(q k^T / sqrt(N), causal) v for grouped queries: head h reads key/value head h // (H / K).

    Args:
      q_BSHN, k_BSKN, v_BSKN: one dtype, rotary embedding applied.
      backend: from `choose`.
      documents_BS: int32 numbers; a query sees the keys of its own document only. None: all before it.
      dropout, key_B: share of the weights that are dropped, with a key a row; no keys, no dropout.

    Returns:
      (B, S, H, N) in the same dtype; the softmax is fp32.
    """
    return BACKENDS[backend].attention(q_BSHN, k_BSKN, v_BSKN, documents_BS, dropout, key_B)
