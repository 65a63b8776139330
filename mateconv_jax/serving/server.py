"""uvicorn, with what it lacks: draining on SIGTERM, and a limit on how long request headers may take."""

import asyncio
import logging
import signal
import socket
import threading
import time
from types import FrameType

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from mateconv_jax import cores
from mateconv_jax.errors import UserError
from mateconv_jax.serving.app import Service, make_app

logger = logging.getLogger("mateconv_jax.serve")

HEADER_SECONDS = 10.0  # for a request's headers, on a new connection and on one that is kept alive


def run(service: Service, host: str, port: int) -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit code.

    Raises:
      UserError: the address is not available.
    """
    listening = listen(host, port)
    cores.allow_open_files(service.limits.max_connections + 200)
    config = uvicorn.Config(
        make_app(service),
        http=Protocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=service.limits.max_connections,
        timeout_graceful_shutdown=5,
        backlog=2048,
    )
    server = DrainingServer(config, service)
    starting = threading.Thread(target=_start_engine, args=(service, server), name="engine start", daemon=True)
    starting.start()
    logger.info("listening on http://%s:%s", *listening.getsockname()[:2])
    server.run(sockets=[listening])
    starting.join()
    service.engine.stop()
    return 1 if server.has_failed else 0


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises UserError if the address is not available."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        # create_server appends the address to the text.
        reason = str(getattr(error, "strerror", None) or error).split(" (while attempting to bind")[0]
        raise UserError(f"--port: cannot listen on {host}:{port} ({reason})") from error


def _start_engine(service: Service, server: "DrainingServer") -> None:
    begin = time.perf_counter()

    def progress(done: int, total: int) -> None:
        if service.status.reason is not None and not service.status.is_draining:
            service.status.reason = f"compiling, {done} of {total} programs"
        server.n_programs = total

    try:
        service.engine.start(progress)
    except Exception as error:
        logger.error("the engine cannot start: %s", error, exc_info=not isinstance(error, UserError))
        service.status.reason = "the engine cannot start"
        server.has_failed = server.should_exit = True
        return
    if not service.status.is_draining:
        service.status.reason = None
    logger.info("ready: %s programs compiled in %.1f s", server.n_programs, time.perf_counter() - begin)


class DrainingServer(uvicorn.Server):
    """On SIGTERM or SIGINT: refuse new requests, give the others drain_seconds, end with exit code 0. A second signal ends it
    at once.
    """

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self._service = service
        self._loop: asyncio.AbstractEventLoop | None = None
        self.has_failed = False
        self.n_programs = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        status = self._service.status
        if status.is_draining or self._loop is None:
            self.should_exit = self.force_exit = True
            return
        status.is_draining, status.reason = True, "shutting down"
        logger.info("%s: finishing %s requests", signal.Signals(sig).name, status.n_requests)
        self._loop.call_soon_threadsafe(lambda: asyncio.ensure_future(self._drain()))

    async def _drain(self) -> None:
        status, limits = self._service.status, self._service.limits
        deadline = time.monotonic() + limits.drain_seconds
        while status.n_requests and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        if status.n_requests:
            logger.info("cancelling %s requests", status.n_requests)
            await asyncio.to_thread(self._service.engine.stop)
        self.should_exit = True


class Protocol(H11Protocol):
    """Closes connections whose next request's headers do not arrive within HEADER_SECONDS. uvicorn itself waits for ever, once
    a connection is new or has sent a byte.
    """

    _header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyrefly: ignore
        super().connection_made(transport)
        self._watch_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watching()
        super().connection_lost(exc)

    def _watch_headers(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_watching()
        elif self._header_timer is None and not self.transport.is_closing():
            self._header_timer = self.loop.call_later(HEADER_SECONDS, self._close_if_waiting)

    def _stop_watching(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _close_if_waiting(self) -> None:
        self._header_timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
