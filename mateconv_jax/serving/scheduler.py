"""From a handler's coroutine to the engine's thread and back."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from mateconv_jax.generation_config import GenerationConfig
from mateconv_jax.inference.engine import Engine
from mateconv_jax.inference.request import Event, Failed, Finished, Piece, QueueFull, Request, Started
from mateconv_jax.serving.guard import Refusal
from mateconv_jax.serving.limits import Limits
from mateconv_jax.serving.metrics import Metrics


class Answers:
    """The answers to one HTTP request, each a request of the engine. Leaving the context cancels what is unfinished.

    async with Answers(...) as answers:
        await answers.started()
        async for index, event in answers.events(): ...
    """

    def __init__(
        self,
        engine: Engine,
        limits: Limits,
        metrics: Metrics,
        prompts: list[tuple[list[int], int]],
        config: GenerationConfig,
        top_logprobs: int | None,
        continues: bool,
    ):
        """
        Args:
          prompts: (token ids, index among the samples of this prompt) of each answer.
          continues: as for Engine.submit.
        """
        self._engine, self._limits, self._metrics = engine, limits, metrics
        self._prompts, self._config, self._top_logprobs, self._continues = prompts, config, top_logprobs, continues
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._early: list[tuple[int, Event]] = []
        self._requests: list[Request] = []
        self._begin = time.monotonic()
        self._first_token: float | None = None
        self.n_reused = 0
        self.n_new = 0

    async def __aenter__(self) -> "Answers":
        loop = asyncio.get_running_loop()
        try:
            for index, (ids, sample) in enumerate(self._prompts):

                def listen(event: Event, index=index) -> None:
                    with contextlib.suppress(RuntimeError):  # the loop is closed: the server ends
                        loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

                request = self._engine.submit(ids, self._config, listen, sample, self._top_logprobs, self._continues)
                self._requests.append(request)
        except QueueFull:
            self._cancel()
            raise Refusal(
                429, f"{self._limits.max_queue} requests are waiting already", "rate_limit_error", code="queue_full",
                retry_after=1,
            ) from None  # fmt: skip
        return self

    async def __aexit__(self, *exception) -> None:
        self._cancel()
        now = time.monotonic()
        if self._first_token is not None:
            self._metrics.duration.observe(now - self._begin)
            if self.n_new > 1:
                self._metrics.between_tokens.observe((now - self._begin - self._first_token) / (self.n_new - 1))

    def _cancel(self) -> None:
        for request in self._requests:
            request.cancel()

    @property
    def first_token_seconds(self) -> float | None:
        """From the request to its first token; None before that."""
        return self._first_token

    async def started(self) -> None:
        """Wait until the first answer has a slot.

        Raises:
          Refusal: not in time, or the engine fails.
        """
        try:
            async with asyncio.timeout(self._limits.queue_seconds):
                index, event = await self._events.get()
        except TimeoutError:
            raise Refusal(
                503,
                f"no slot was free for {self._limits.queue_seconds:g} s",
                "server_error",
                code="queue_timeout",
                retry_after=5,
            ) from None
        self._early.append((index, event))
        if isinstance(event, Failed):
            raise _failure(event)

    async def events(self) -> AsyncIterator[tuple[int, Piece | Finished]]:
        """Pieces and ends of all answers as they come, until the last has ended.

        Raises:
          Refusal: time is up, or the engine fails.
        """
        n_left = len(self._prompts)
        while n_left:
            index, event = self._early.pop(0) if self._early else await self._next()
            if isinstance(event, Started):
                if self._prompts[index][1] == 0:  # usage counts a prompt once, whatever the number of its samples
                    self.n_reused += event.n_reused
                continue
            if isinstance(event, Failed):
                raise _failure(event)
            if isinstance(event, Finished):
                n_left -= 1
                self.n_new += len(event.generation.token_ids)
            if self._first_token is None:
                self._first_token = time.monotonic() - self._begin
                self._metrics.first_token.observe(self._first_token)
            yield index, event

    async def _next(self) -> tuple[int, Event]:
        try:
            async with asyncio.timeout(max(0.0, self._begin + self._limits.request_seconds - time.monotonic())):
                return await self._events.get()
        except TimeoutError:
            seconds = self._limits.request_seconds
            raise Refusal(504, f"not finished within {seconds:g} s", "timeout", code="timeout") from None


def _failure(event: Failed) -> Refusal:
    is_ending = event.reason == "the engine stops"
    return Refusal(503 if is_ending else 500, event.reason, "server_error", code="shutting_down" if is_ending else "failed")
