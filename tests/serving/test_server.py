"""The command in a process of its own, as its clients meet it."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from mateconv_jax import GenerationConfig, TextGenerator
from tests import llama

pytestmark = pytest.mark.slow

QUESTION = [{"role": "user", "content": "小明"}]
OPENAI = GenerationConfig(temperature=1.0, top_k=0, top_p=1.0, seed=3, max_new_tokens=12)


@pytest.fixture(scope="module")
def model(dataset_folder, tmp_path_factory):
    """A Hugging Face folder with a context of 96."""
    return llama.hugging_face_folder(tmp_path_factory.mktemp("model") / "tiny", dataset_folder, 96)


@pytest.fixture(scope="module")
def generator(model):
    return TextGenerator.from_pretrained(model)


class Server:
    """`serve` on a free port. `log` is its standard error so far."""

    def __init__(self, model, folder, *options):
        self._log = folder / f"serve{len(list(folder.iterdir()))}.log"
        command = [sys.executable, "-m", "mateconv_jax.serve", f"--model_path={model}", "--port=0", *options]
        self.process = subprocess.Popen(command, stderr=self._log.open("wb"), env=os.environ)
        deadline = time.monotonic() + 240
        while not (found := re.search(r"listening on (http://127.0.0.1:(\d+))", self.log)):
            assert self.process.poll() is None and time.monotonic() < deadline, self.log
            time.sleep(0.05)
        self.url, self.port = found[1], int(found[2])

    @property
    def log(self):
        return self._log.read_text()

    def wait_until_ready(self):
        while httpx.get(f"{self.url}/health").status_code != 200:
            assert self.process.poll() is None, self.log
            time.sleep(0.05)
        return self

    def counts(self):
        """(threads, open files, resident MB) of the process."""
        folder = Path(f"/proc/{self.process.pid}")
        status = (folder / "status").read_text()
        return (
            int(re.search(r"Threads:\s+(\d+)", status)[1]),
            len(list((folder / "fd").iterdir())),
            int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024,
        )

    def stop(self, seconds=60):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    server = Server(model, tmp_path_factory.mktemp("logs"), "--max_batch=4", "--max_queue=1000").wait_until_ready()
    yield server
    assert server.stop() == 0, server.log
    assert "Traceback" not in server.log, server.log


# ---- clients ----------------------------------------------------------------------------------------------------------


def test_the_openai_client_sync_and_streaming(server, generator):
    import openai

    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == ["tiny"]
    expected = generator.chat(QUESTION, OPENAI)
    options = dict(model="tiny", messages=QUESTION, seed=3, max_tokens=12)
    answer = client.chat.completions.create(**options, n=2, logprobs=True, top_logprobs=2)
    assert answer.choices[0].message.content == expected and answer.choices[1].message.content != expected
    assert len(answer.choices[0].logprobs.content) == len(expected.token_ids)
    stream = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == expected
    assert stream[-1].usage.completion_tokens == len(expected.token_ids)
    with client.chat.completions.stream(model="tiny", messages=QUESTION, seed=3, max_tokens=12) as events:
        assert "".join(event.delta for event in events if event.type == "content.delta") == expected
    text = client.completions.create(model="tiny", prompt="小明", seed=3, max_tokens=12, logprobs=2)
    assert text.choices[0].text == generator.generate("小明", OPENAI)
    with pytest.raises(openai.BadRequestError, match="functions: not supported") as error:
        client.chat.completions.create(**options, extra_body={"functions": []})
    assert error.value.param == "functions"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4", messages=QUESTION)
    history = [*QUESTION, answer.choices[0].message, {"role": "user", "content": "还有呢"}]  # the client's own object goes back
    assert client.chat.completions.create(model="tiny", messages=history, max_tokens=5).usage.total_tokens > 12


def test_the_openai_client_async_many_at_once(server, generator):
    import openai

    prompts = ["小明", "法国", "熊猫", "今天"] * 6
    expected = {prompt: generator.generate(prompt, OPENAI) for prompt in set(prompts)}

    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:

            async def ask(prompt):
                stream = await client.completions.create(model="tiny", prompt=prompt, seed=3, max_tokens=12, stream=True)
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*map(ask, prompts))

    assert asyncio.run(ask_all()) == [expected[prompt] for prompt in prompts]


def test_langchain(server, generator):
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(model="tiny", base_url=f"{server.url}/v1", api_key="none", seed=3, max_tokens=12, temperature=1.0)
    expected = generator.chat(QUESTION, OPENAI)
    answer = chat.invoke([("human", "小明")])
    assert answer.content == expected and answer.usage_metadata["output_tokens"] == len(expected.token_ids)
    assert "".join(piece.content for piece in chat.stream([("human", "小明")])) == expected
    assert [one.content for one in chat.batch([[("human", "小明")]] * 3)] == [expected] * 3


# ---- robustness -------------------------------------------------------------------------------------------------------


def body_of(**changes):
    return json.dumps({"model": "tiny", "prompt": "小明", "seed": 3, "max_tokens": 12} | changes).encode()


def raw_request(body, length=None):
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length or len(body)}\r\n\r\n"
    return head.encode() + body


def test_slow_half_closed_and_too_many_clients_hold_nothing(model, tmp_path, generator):
    server = Server(model, tmp_path, "--max_batch=1", "--body_seconds=1", "--max_connections=8").wait_until_ready()
    try:
        with socket.create_connection(("127.0.0.1", server.port)) as slow:
            slow.sendall(raw_request(body_of()[:5], 100))
            answer = httpx.post(f"{server.url}/v1/completions", content=body_of(), headers={"content-type": "application/json"})
            assert answer.json()["choices"][0]["text"] == generator.generate("小明", OPENAI)  # meanwhile
            slow.settimeout(10)
            assert slow.recv(1000).startswith(b"HTTP/1.1 408 ")
        with (
            socket.create_connection(("127.0.0.1", server.port)) as silent,
            socket.create_connection(("127.0.0.1", server.port)) as half,
        ):
            silent.settimeout(20), half.settimeout(20)
            half.sendall(b"POST /v1/comp")
            assert silent.recv(10) == b"" and half.recv(10) == b""  # closed after HEADER_SECONDS
        with socket.create_connection(("127.0.0.1", server.port)) as half_closed:
            half_closed.sendall(raw_request(body_of(max_tokens=90, min_tokens=90)))
            half_closed.shutdown(socket.SHUT_WR)
            half_closed.settimeout(20)
            half_closed.recv(1000)
        with socket.socket() as stalled:  # it asks for a stream and never reads
            stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            stalled.connect(("127.0.0.1", server.port))
            stalled.sendall(raw_request(body_of(max_tokens=90, min_tokens=90, stream=True)))
            answer = httpx.post(f"{server.url}/v1/completions", content=body_of(), headers={"content-type": "application/json"})
            assert answer.json()["choices"][0]["text"] == generator.generate("小明", OPENAI)
        few, many = too_many(server)
        assert few == {b"HTTP/1.1 200 OK\r\n"} and b"HTTP/1.1 503 Service Unavailable\r\n" in many
        assert httpx.get(f"{server.url}/health").status_code == 200
    finally:
        assert server.stop() == 0
    assert "Traceback" not in server.log, server.log


def too_many(server):
    """The status lines of 5 requests, and of 15 more while their connections stay open."""
    with contextlib.ExitStack() as stack:

        def ask(n):
            senders = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port))) for _ in range(n)]
            for sender in senders:
                sender.sendall(raw_request(body_of()))
            return {sender.makefile("rb").readline() for sender in senders}

        return ask(5), ask(15)


def test_500_open_connections_are_served(server):
    """All opened before any is used; each then gets its answer, or a 429 if the queue is full."""

    async def all_at_once():
        connections = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(500)]
        for _, writer in connections:
            writer.write(raw_request(body_of(max_tokens=2)))
        answers = await asyncio.gather(*(reader.readline() for reader, _ in connections))
        for _, writer in connections:
            writer.close()
        return answers

    assert set(asyncio.run(all_at_once())) == {b"HTTP/1.1 200 OK\r\n"}


def test_a_soak_of_2000_requests_with_random_cancels_leaves_nothing_behind(server):
    import random

    rng = random.Random(0)

    async def soak(n):
        async with httpx.AsyncClient(base_url=server.url, timeout=300) as client:

            async def one(i):
                stream, patience = rng.random() < 0.5, rng.choice((None, None, 0.01, 0.1, 0.3))
                body = dict(
                    model="tiny", prompt="小明" * rng.randrange(1, 9), max_tokens=rng.choice((1, 5, 20, 90)), stream=stream,
                    temperature=rng.choice((0, 1)), top_k=rng.choice((0, 5, 99)), n=rng.choice((1, 1, 2)),
                )  # fmt: skip
                if patience is None:
                    return (await client.post("/v1/completions", json=body)).status_code
                try:
                    async with asyncio.timeout(patience), client.stream("POST", "/v1/completions", json=body) as response:
                        async for _ in response.aiter_bytes():
                            pass
                        return response.status_code
                except TimeoutError:
                    return "gone"

            results, numbers = [], iter(range(n))

            async def worker():
                for i in numbers:
                    results.append(await one(i))

            await asyncio.gather(*(worker() for _ in range(48)))
            return results

    def settled():
        while (
            "mateconv_slots_active 0.0" not in (text := httpx.get(f"{server.url}/metrics").text)
            or "mateconv_queue 0.0" not in text
        ):
            time.sleep(0.1)
        time.sleep(6)  # uvicorn closes idle connections after 5 s
        return server.counts()

    asyncio.run(soak(300))
    threads, files, megabytes = settled()
    results = asyncio.run(soak(2000))
    after = settled()
    print(
        f"soak: { ({r: results.count(r) for r in set(results)}) }; threads {threads} → {after[0]}, files {files} → {after[1]}, MB {megabytes:.0f} → {after[2]:.0f}"
    )
    assert set(results) <= {200, "gone"} and results.count("gone") > 100
    assert after[0] <= threads + 2 and after[1] <= files + 2 and after[2] < megabytes + 30


def test_sigterm_finishes_what_has_begun_refuses_the_rest_and_exits_0(model, tmp_path):
    server = Server(model, tmp_path, "--max_batch=2", "--drain_seconds=30").wait_until_ready()
    with httpx.Client(base_url=server.url, timeout=60) as client, httpx.Client(base_url=server.url, timeout=60) as other:
        assert other.get("/health").status_code == 200  # an open connection
        body = {"model": "tiny", "prompt": "小明", "max_tokens": 90, "min_tokens": 90, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.05)
            try:
                assert other.post("/v1/completions", json=body).status_code == 503
            except httpx.TransportError:
                pass  # it has finished already
            assert [line for line in lines if line][-1] == "data: [DONE]"
    assert server.process.wait(30) == 0
    assert "Traceback" not in server.log, server.log


def test_sigterm_cancels_what_takes_too_long_and_exits_0(model, tmp_path):
    server = Server(model, tmp_path, "--max_batch=1", "--drain_seconds=0", "--max_samples=16").wait_until_ready()
    body = {"model": "tiny", "prompt": "小明", "max_tokens": 90, "min_tokens": 90, "n": 16, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "shutting_down"
    assert server.process.wait(30) == 0


def test_an_address_in_use_is_one_line(server, model):
    command = [sys.executable, "-m", "mateconv_jax.serve", f"--model_path={model}", f"--port={server.port}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == f"error: --port: cannot listen on 127.0.0.1:{server.port} (Address already in use)"
