"""The HTTP application: routes and error shapes. What must not get in is stopped in guard.py."""

import asyncio
import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import prometheus_client
import swagger_ui_bundle
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import StreamingResponse
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from mateconv_jax.generation_config import GenerationConfig
from mateconv_jax.inference.engine import Engine
from mateconv_jax.inference.text_generator import TextGenerator
from mateconv_jax.serving import chat_page, openai_schema
from mateconv_jax.serving.answer_parts import AnswerParts
from mateconv_jax.serving.completions import ChatCompletion, Completion, TextCompletion, server_sent
from mateconv_jax.serving.guard import Access, Guard, Refusal, Status
from mateconv_jax.serving.limits import Limits
from mateconv_jax.serving.metrics import Metrics
from mateconv_jax.serving.openai_schema import ChatRequest, CompletionRequest, Sampled
from mateconv_jax.serving.prompts import OPENAI, Prompts
from mateconv_jax.serving.scheduler import Answers
from mateconv_jax.serving.token_texts import TokenTexts

SWAGGER = next(Path(swagger_ui_bundle.__file__).parent.glob("vendor/swagger-ui-*"))
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclasses.dataclass
class Service:
    """What the routes need.

    Attributes:
      model_id: the name that clients ask for.
      defaults: sampling options that a request leaves out.
      log_contents: write prompts and answers into the log.
    """

    generator: TextGenerator
    engine: Engine
    model_id: str
    max_batch: int
    limits: Limits = Limits()
    access: Access = Access()
    defaults: GenerationConfig = OPENAI
    log_contents: bool = False
    status: Status = dataclasses.field(default_factory=Status)


def make_app(service: Service) -> FastAPI:
    """The application. It answers once service.status.reason is None."""
    app = FastAPI(title="mateconv_jax", summary="An OpenAI-compatible server", docs_url=None, redoc_url=None)
    metrics = Metrics(service.engine, service.max_batch)
    _add_errors(app)
    _add_information(app, service, metrics)
    _add_completions(app, service, metrics)
    app.router.routes.extend(chat_page.routes(service.engine.context, bool(service.access.keys)))
    app.add_middleware(
        Guard, access=service.access, limits=service.limits, status=service.status, metrics=metrics
    )  # fmt: skip
    if service.access.origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(service.access.origins), allow_methods=["*"], allow_headers=["*"])
    return app


# ---- errors -----------------------------------------------------------------------------------------------------------


def _add_errors(app: FastAPI) -> None:
    async def refused(request: Request, refusal: Refusal) -> Response:
        return JSONResponse(refusal.body, refusal.status_code, refusal.headers)

    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = max(error.errors(), key=lambda one: len(one["loc"]))  # of a union's alternatives, the one that came furthest
        param = _field(first["loc"])
        problem = first["msg"]
        if first["type"] == "extra_forbidden":
            problem = "not supported by this server"
        return JSONResponse(openai_schema.error(f"{param}: {problem}" if param else problem, param=param), 400)

    async def of_http(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(openai_schema.error(message), error.status_code, error.headers)

    async def unexpected(request: Request, error: Exception) -> Response:
        return JSONResponse(openai_schema.error("internal error; the server's log has it", "server_error"), 500)

    app.add_exception_handler(Refusal, refused)  # pyrefly: ignore
    app.add_exception_handler(RequestValidationError, invalid)  # pyrefly: ignore
    app.add_exception_handler(HTTPException, of_http)  # pyrefly: ignore
    app.add_exception_handler(Exception, unexpected)


def _field(location: tuple) -> str | None:
    """The field's name for people, messages.0.content, without the steps that name a type."""
    named = []
    for before, step in zip(("", *location), location, strict=False):
        is_type = step == "body" and not named or step in ("str", "int", "TextPart") or "[" in str(step)
        if not (is_type or isinstance(before, int) and step in ROLES):
            named.append(str(step))
    return ".".join(named) or None


# ---- routes -----------------------------------------------------------------------------------------------------------


def _add_information(app: FastAPI, service: Service, metrics: Metrics) -> None:
    model = {"id": service.model_id, "object": "model", "created": 0, "owned_by": "mateconv_jax"}

    @app.get("/v1/models")
    async def list_models() -> dict:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def get_model(name: str) -> dict:
        _check_model(service, name)
        return model

    @app.get("/health")
    async def health() -> Response:
        """200 when requests are taken, 503 with the reason otherwise."""
        reason = service.status.reason
        return JSONResponse({"status": "ready" if reason is None else reason}, 200 if reason is None else 503)

    @app.get("/metrics")
    async def get_metrics() -> Response:
        """For Prometheus."""
        return PlainTextResponse(
            prometheus_client.generate_latest(metrics.registry), media_type=prometheus_client.CONTENT_TYPE_LATEST
        )

    app.mount("/docs/static", StaticFiles(directory=SWAGGER))

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="/openapi.json", title="mateconv_jax", swagger_js_url="/docs/static/swagger-ui-bundle.js",
            swagger_css_url="/docs/static/swagger-ui.css", swagger_favicon_url="/docs/static/favicon-32x32.png",
        )  # fmt: skip


def _add_completions(app: FastAPI, service: Service, metrics: Metrics) -> None:
    prompts = Prompts(service.generator, service.engine.context, service.limits, service.defaults)
    token_texts = TokenTexts(copy.deepcopy(service.generator.tokenizer))

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        _check_model(service, body.model)
        if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
            raise Refusal(400, "max_tokens: differs from max_completion_tokens, its newer name", param="max_tokens")
        if body.top_logprobs is not None and not body.logprobs:
            raise Refusal(400, "top_logprobs: needs logprobs to be true", param="top_logprobs")
        config = prompts.config(body, body.max_completion_tokens or body.max_tokens)
        ids, parts = await run_in_threadpool(prompts.chat, body)
        n = body.n or 1
        top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
        texts = token_texts if body.logprobs else None
        completion = ChatCompletion(service.model_id, len(ids), [copy.copy(parts) for _ in range(n)], texts, bool(body.stream))
        samples = _samples(service, [ids], n)
        answers = Answers(service.engine, service.limits, metrics, samples, config, top_logprobs, continues=False)
        return await _answer(service, body, request, completion, answers, config)

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        _check_model(service, body.model)
        n = body.n or 1
        if body.best_of not in (None, n):
            raise Refusal(400, f"best_of: {body.best_of} is not supported (expected n, {n})", param="best_of")
        config = prompts.config(body, 16 if body.max_tokens is None else body.max_tokens)
        found = await run_in_threadpool(prompts.completions, body)
        samples = _samples(service, found, n)
        completion = TextCompletion(
            service.model_id,
            sum(map(len, found)),
            [AnswerParts(False, False, False) for _ in samples],
            None if body.logprobs is None else token_texts,
            bool(body.stream),
        )
        answers = Answers(service.engine, service.limits, metrics, samples, config, body.logprobs, continues=True)
        return await _answer(service, body, request, completion, answers, config)


def _check_model(service: Service, name: str) -> None:
    if name != service.model_id:
        problem = f"model: no {name!r} here (expected {service.model_id!r})"
        raise Refusal(404, problem, param="model", code="model_not_found")


def _samples(service: Service, prompts: list[list[int]], n: int) -> list[tuple[list[int], int]]:
    """(token ids, index among the samples of its prompt) of every answer."""
    if len(prompts) * n > service.limits.max_samples:
        limit, param = service.limits.max_samples, "n" if len(prompts) == 1 else "prompt"
        raise Refusal(400, f"{param}: {len(prompts) * n} answers (expected at most {limit})", param=param)
    return [(ids, sample) for ids in prompts for sample in range(n)]


async def _answer(
    service: Service, body: Sampled, request: Request, completion: Completion, answers: Answers, config: GenerationConfig
) -> Response:
    if body.stream_options is not None and not body.stream:
        raise Refusal(400, "stream_options: needs stream to be true", param="stream_options")
    log: dict = request.state.log
    log |= {"seed": config.seed} | ({"user": body.user} if body.user is not None else {})
    if service.log_contents:
        log["request"] = body.model_dump(exclude_none=True)

    def note() -> None:
        first = answers.first_token_seconds
        log.update(new=completion.n_new, reasons=",".join(completion.reasons), first=None if first is None else round(first, 3))
        if service.log_contents:
            log["answers"] = completion.texts

    await answers.__aenter__()
    try:
        await _while_connected(request, answers.started())
        if body.stream:
            include_usage = body.stream_options is not None and body.stream_options.include_usage
            return EventStream(_events(completion, answers, include_usage), answers, note)
        whole = await _while_connected(request, completion.whole(answers))
    except BaseException:
        await answers.__aexit__()
        note()
        raise
    await answers.__aexit__()
    note()
    return JSONResponse(whole)


async def _events(completion: Completion, answers: Answers, include_usage: bool):
    try:
        async for chunk in completion.chunks(answers, include_usage):
            yield server_sent(chunk)
    except Refusal as refusal:  # the status is out already
        yield server_sent(refusal.body)
        return
    yield "data: [DONE]\n\n"


class EventStream(StreamingResponse):
    """Server-sent events. However it ends, its answers end with it."""

    def __init__(self, events, answers: Answers, note: Callable[[], None]):
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._answers, self._note = answers, note

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._answers.__aexit__()
            self._note()


class ClientGone(Refusal):
    """Nobody reads the answer."""

    def __init__(self):
        super().__init__(499, "the client closed the connection", code="client_closed")


async def _while_connected(request: Request, coroutine):
    """The coroutine's result. If the client goes meanwhile, cancel it and raise ClientGone."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, watch = asyncio.create_task(coroutine), asyncio.create_task(gone())
    try:
        await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientGone
        return work.result()
    finally:
        for task in (work, watch):
            task.cancel()
        await asyncio.gather(work, watch, return_exceptions=True)
