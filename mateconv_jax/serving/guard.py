"""Who may ask, and how much: checks before a request reaches its handler, as ASGI middleware."""

import asyncio
import dataclasses
import hmac
import json
import logging
import time
from urllib.parse import urlsplit

from fastapi.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mateconv_jax.serving import openai_schema
from mateconv_jax.serving.limits import Limits, RequestRate
from mateconv_jax.serving.metrics import Metrics

logger = logging.getLogger("mateconv_jax.serve")

# Anyone may see whether the server is up, and the pages, which hold nothing.
OPEN_PATHS = ("/health", "/docs", "/openapi.json")
API = ("/v1/", "/metrics")
GRACE_SECONDS = 5.0  # for a stream to end by itself when its time is up


class Refusal(HTTPException):
    """A request that is refused, in OpenAI's error shape. An HTTPException, because FastAPI makes a 400 of any other exception
    while it reads a body.
    """

    def __init__(
        self, status: int, message: str, kind: str = "invalid_request_error", param: str | None = None,
        code: str | None = None, retry_after: float | None = None,
    ):  # fmt: skip
        headers = {} if retry_after is None else {"retry-after": str(max(1, round(retry_after)))}
        super().__init__(status, message, headers)
        self.code = code
        self.body = openai_schema.error(message, kind, param, code)


@dataclasses.dataclass(frozen=True)
class Access:
    """Who may ask.

    Attributes:
      keys: API keys; empty: none is needed.
      hosts: names that a Host header may have, without port; None: any.
      origins: other sites whose pages may ask (CORS).
    """

    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] | None = None
    origins: tuple[str, ...] = ()


@dataclasses.dataclass
class Status:
    """What a server is doing now. `reason`: why it takes no requests; None: it does."""

    reason: str | None = "loading"
    is_draining: bool = False
    n_requests: int = 0


class Guard:
    """Refuses what must not get through, bounds the time of a request, and writes one log line for each."""

    def __init__(self, app: ASGIApp, access: Access, limits: Limits, status: Status, metrics: Metrics):
        self._app, self._access, self._limits, self._status, self._metrics = app, access, limits, status, metrics
        self._keys = [key.encode() for key in access.keys]
        self._rate = RequestRate(limits.requests_per_minute)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # "lifespan"; there are no websockets
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        begin, reply = time.perf_counter(), _Reply(send)
        scope.setdefault("state", {})["log"] = log = {}
        self._status.n_requests += 1
        try:
            async with asyncio.timeout(self._limits.request_seconds + GRACE_SECONDS):
                self._check(scope)
                await self._app(scope, self._limited(receive, scope), reply.send)
        except Refusal as refusal:
            await self._refuse(refusal, reply)
        except TimeoutError:
            too_long = Refusal(504, f"not finished within {self._limits.request_seconds:g} s", "timeout", code="timeout")
            await self._refuse(too_long, reply)
        finally:
            self._status.n_requests -= 1
            self._note(scope, reply.status, time.perf_counter() - begin, log)

    async def _refuse(self, refusal: Refusal, reply: "_Reply") -> None:
        if reply.status is not None:  # half an answer is out: only closing the connection is left
            raise refusal
        self._metrics.refusals.labels(refusal.code or str(refusal.status_code)).inc()
        await respond(reply.send, refusal)

    def _check(self, scope: Scope) -> None:
        """Raises Refusal."""
        connection, path = HTTPConnection(scope), scope["path"]
        host = connection.headers.get("host", "")
        name = _host_name(host)
        if self._access.hosts is not None and name not in self._access.hosts:
            raise Refusal(403, f"Host: {host!r} is not this server (expected {' or '.join(self._access.hosts)})", code="host")
        origin = connection.headers.get("origin")
        if origin is not None and origin not in self._access.origins and urlsplit(origin).netloc != host:
            raise Refusal(403, f"Origin: pages of {origin!r} may not ask (name it with --cors_origin)", code="origin")
        if not path.startswith(API):
            return
        key = self._key(connection)
        if path.startswith("/v1/"):
            if self._status.reason is not None:
                raise Refusal(503, f"not ready: {self._status.reason}", "server_error", code="not_ready", retry_after=2)
            if not self._rate.allows(key):
                raise Refusal(
                    429, f"more than {self._limits.requests_per_minute} requests a minute", "rate_limit_error",
                    code="rate_limit_exceeded", retry_after=self._rate.seconds_to_wait(key),
                )  # fmt: skip
        if int(connection.headers.get("content-length") or 0) > self._limits.max_body_bytes:
            raise self._too_large()

    def _key(self, connection: HTTPConnection) -> str:
        """The caller's API key, or its address where none is needed."""
        if not self._keys:
            return connection.client.host if connection.client else ""
        scheme, _, given = connection.headers.get("authorization", "").partition(" ")
        # All keys are compared, each in constant time.
        matches = [hmac.compare_digest(given.strip().encode(), key) for key in self._keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise Refusal(401, "Authorization: no valid API key (expected Bearer KEY)", param=None, code="invalid_api_key")
        return f"key {matches.index(True)}"

    def _too_large(self) -> Refusal:
        return Refusal(413, f"the body is larger than {self._limits.max_body_bytes} bytes", code="body_too_large")

    def _limited(self, receive: Receive, scope: Scope) -> Receive:
        """`receive` within the limits of size and time, until the body is there."""
        n_bytes, deadline, is_whole = 0, time.monotonic() + self._limits.body_seconds, False

        async def limited() -> Message:
            nonlocal n_bytes, is_whole
            if is_whole:
                return await receive()
            try:
                async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                    message = await receive()
            except TimeoutError:
                seconds = self._limits.body_seconds
                raise Refusal(408, f"the body did not arrive within {seconds:g} s", "timeout", code="body_timeout") from None
            n_bytes += len(message.get("body", b""))
            if n_bytes > self._limits.max_body_bytes:
                raise self._too_large()
            is_whole = not message.get("more_body", False)
            return message

        return limited

    def _note(self, scope: Scope, status: int | None, seconds: float, log: dict) -> None:
        path = scope["path"] if scope["path"] in (*OPEN_PATHS, *KNOWN) else "other"
        self._metrics.requests.labels(path, str(status or "closed")).inc()
        client = scope["client"][0] if scope.get("client") else "-"
        details = " ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in log.items())
        logger.info("%s %s %.200r %s %.3f s %s", client, scope["method"], scope["path"], status or "closed", seconds, details)


KNOWN = ("/v1/models", "/v1/chat/completions", "/v1/completions", "/metrics", "/")


class _Reply:
    """Passes on what is sent, and remembers the status."""

    def __init__(self, send: Send):
        self._send = send
        self.status: int | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)


async def respond(send: Send, refusal: Refusal) -> None:
    body = json.dumps(refusal.body, ensure_ascii=False).encode("utf-8", "backslashreplace")
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        **(refusal.headers or {}),
    }
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status_code, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def _host_name(host: str) -> str | None:
    """A Host header without its port; None if it is no host."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
