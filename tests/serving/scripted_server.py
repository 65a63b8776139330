"""A server for the chat page whose answers arrive and break off when a test says so."""

import asyncio
import json
import threading
import time

import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from mateconv_jax.serving import chat_page, openai_schema

CONTEXT = 200
LONG_LINE = "a" * 20_000
HOSTILE = (
    "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>\n\n"
    "[link](javascript:window.hacked=3) ![picture](http://example.invalid/leak.png) <b onclick='window.hacked = 4'>bold</b>\n\n"
    '```html\n<script>window.hacked = 5</script>\n```\n\n```x"onmouseover="window.hacked=6\ncode\n```'
)
MARKDOWN = "# 标题\n\n- 一\n- **二**\n\n```python\ndef f(x):\n    return x + 1\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n"


class Script:
    """Answers by what the last question says; a token is a character. `requests` are the bodies that came."""

    def __init__(self):
        self.requests = []
        self.go_on = threading.Event()  # lets a slow answer end
        self.breaks = True  # 断 breaks off
        self.cancelled = 0

    def routes(self):
        return [
            Route("/health", self.health),
            Route("/v1/models", self.models),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            *chat_page.routes(CONTEXT, False),
        ]

    async def health(self, request: Request):
        return JSONResponse({"status": "ready"})

    async def models(self, request: Request):
        return JSONResponse({"data": [{"id": "scripted"}]})

    async def chat(self, request: Request):
        body = await request.json()
        self.requests.append(body)
        openai_schema.ChatRequest.model_validate(body)  # what the page sends, the real server takes
        n = sum(len(message["content"]) + 4 for message in body["messages"])
        if n >= CONTEXT:
            problem = f"messages: {n} tokens leave no room in the context of {CONTEXT} (expected at most {CONTEXT - 1})"
            return JSONResponse(openai_schema.error(problem, code="context_length_exceeded"), 400)
        question = body["messages"][-1]["content"]
        if question == "忙":
            return JSONResponse(openai_schema.error("queue full", code="queue"), 429, {"retry-after": "7"})
        return StreamingResponse(self.events(question, n), media_type="text/event-stream")

    async def events(self, question, n):
        def event(delta, reason=None, usage=None):
            choices = [] if usage else [{"index": 0, "delta": delta, "finish_reason": reason}]
            return f"data: {json.dumps({'choices': choices, 'usage': usage})}\n\n"

        answers = {
            "脚本": HOSTILE,
            "长行": LONG_LINE,
            "格式": MARKDOWN,
            "慢": "一二三四五六",
            "断": "一二三四五六",
            "半": "一二三",
        }
        text = answers.get(question, f"回答：{question}")
        size = 1000 if len(text) > 1000 else 3
        try:
            yield event({"role": "assistant", "content": ""})
            if question == "想":
                yield event({"reasoning_content": "让我想想"})
            for i in range(0, len(text), size):
                yield event({"content": text[i : i + size]})
                if question == "慢":
                    while not self.go_on.is_set():
                        await asyncio.sleep(0.02)
                if question == "断" and self.breaks:
                    await asyncio.sleep(0.3)  # what the browser has not handed out yet is lost with the connection
                    raise ConnectionAbortedError
            if question == "半" and self.breaks:
                return
            yield event({}, "stop")
            yield event({}, usage={"prompt_tokens": n, "completion_tokens": len(text), "total_tokens": n + len(text)})
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


class InThread:
    """An application on a free port, until stop()."""

    def __init__(self, app, port=0):
        config = uvicorn.Config(app, port=port, log_level="critical", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        deadline = time.monotonic() + 20
        while not self._server.started:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://localhost:{self.port}/"

    def stop(self):
        self._server.should_exit = True
        self._thread.join(20)
