"""What a server allows, and how often a key may ask."""

import dataclasses
import time

import limits
import limits.storage
import limits.strategies

from mateconv_jax.errors import check_values


@dataclasses.dataclass(frozen=True)
class Limits:
    """Each is an option of `serve`; what exceeds it is refused with the status in brackets.

    Attributes:
      max_body_bytes: of a request's body [413].
      body_seconds: for a client to send its request [408; headers: the connection is closed].
      max_messages: of a dialogue [400].
      max_samples: answers to one request, prompts times n [400].
      max_queue: requests that wait for a slot [429].
      queue_seconds: in the queue [503].
      request_seconds: in all [504; a stream that has begun ends with an error].
      requests_per_minute: of one API key, or of one client's address without keys; 0: any number [429].
      max_connections: open connections [503].
      drain_seconds: after SIGTERM, for requests to finish [503 for new ones].
    """

    max_body_bytes: int = 2**20
    body_seconds: float = 30.0
    max_messages: int = 1000
    max_samples: int = 16
    max_queue: int = 256
    queue_seconds: float = 120.0
    request_seconds: float = 600.0
    requests_per_minute: int = 0
    max_connections: int = 1000
    drain_seconds: float = 30.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("requests_per_minute", "drain_seconds"):
                check_values(self, [(field.name, value >= 0, "a number, at least 0")])
            else:
                check_values(self, [(field.name, value > 0, "a number above 0")])


class RequestRate:
    """Requests of the last minute, by key."""

    def __init__(self, per_minute: int):
        self._item = limits.RateLimitItemPerMinute(per_minute) if per_minute else None
        self._limiter = limits.strategies.MovingWindowRateLimiter(limits.storage.MemoryStorage())

    def allows(self, key: str) -> bool:
        """Counts the request if so."""
        return self._item is None or self._limiter.hit(self._item, key)

    def seconds_to_wait(self, key: str) -> float:
        """Until the next request of `key` is allowed."""
        assert self._item is not None
        return max(0.0, self._limiter.get_window_stats(self._item, key).reset_time - time.time())
