"""The HTTP interface in this process, through Starlette's TestClient."""

import dataclasses
import json
import time

import numpy as np
import pytest
from starlette.testclient import TestClient

from mateconv_jax import GenerationConfig
from mateconv_jax.inference.request import QueueFull
from mateconv_jax.serving.app import Service, make_app
from mateconv_jax.serving.guard import Access, Status
from mateconv_jax.serving.limits import Limits
from mateconv_jax.serving.token_texts import TokenTexts
from tests import llama2_tokenizer

QUESTION = [{"role": "user", "content": "小明"}]
OPENAI = GenerationConfig(temperature=1.0, top_k=0, top_p=1.0, seed=3, max_new_tokens=12)
CHAT = {"model": "tiny", "messages": QUESTION, "seed": 3, "max_tokens": 12}
TEXT = {"model": "tiny", "prompt": "小明", "seed": 3, "max_tokens": 12}


@pytest.fixture(scope="module")
def serve(generator, engine):
    """A client of an application with these settings."""

    def serve(**settings):
        service = Service(generator, engine, "tiny", 4, **{"status": Status(None)} | settings)
        return TestClient(make_app(service), base_url="http://localhost:8000", raise_server_exceptions=False)

    return serve


@pytest.fixture(scope="module")
def client(serve):
    return serve(access=Access(hosts=("localhost",)))


def chunks(client, path, body):
    """The objects of a stream, which ends with [DONE]."""
    with client.stream("POST", path, json=body | {"stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        *events, done, rest = "".join(response.iter_text()).split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def error_of(response, status):
    """OpenAI's error object."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


# ---- answers ----------------------------------------------------------------------------------------------------------


def test_a_chat_answers_as_the_generator_does_streamed_or_not(client, generator):
    expected = generator.chat(QUESTION, OPENAI)
    answer = client.post("/v1/chat/completions", json=CHAT).json()
    choice = answer["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": str(expected)}
    assert choice["finish_reason"] == {"eos": "stop", "length": "length"}[expected.finish_reason]
    usage = answer["usage"]
    assert usage["prompt_tokens"] == expected.n_prompt_tokens and usage["completion_tokens"] == len(expected.token_ids)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-") and answer["model"] == "tiny"

    first, *pieces, last, usage = chunks(client, "/v1/chat/completions", CHAT | {"stream_options": {"include_usage": True}})
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(piece["choices"][0]["delta"]["content"] for piece in pieces) == expected
    assert last["choices"][0]["delta"] == {} and last["choices"][0]["finish_reason"] == choice["finish_reason"]
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == len(expected.token_ids)
    assert {chunk["object"] for chunk in (first, *pieces, last, usage)} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in (first, *pieces, last)}) == 1


def test_a_completion_answers_each_prompt_n_times_as_the_generator_does(client, generator):
    answer = client.post("/v1/completions", json=TEXT | {"prompt": ["小明", "法国"], "n": 2}).json()
    expected = [*generator.generate_samples("小明", 2, OPENAI), *generator.generate_samples("法国", 2, OPENAI)]
    assert [choice["text"] for choice in answer["choices"]] == expected
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3] and answer["object"] == "text_completion"
    assert answer["usage"]["completion_tokens"] == sum(len(text.token_ids) for text in expected)
    streamed = chunks(client, "/v1/completions", TEXT | {"n": 2})
    texts = ["".join(c["choices"][0]["text"] for c in streamed if c["choices"][0]["index"] == i) for i in (0, 1)]
    assert texts == expected[:2]
    ids = generator.document_ids("小明")
    assert client.post("/v1/completions", json=TEXT | {"prompt": ids}).json()["choices"][0]["text"] == expected[0]


def test_usage_counts_what_was_cached_of_a_prompt_once(client):
    body = TEXT | {"prompt": "熊猫最爱吃竹子。法国的首都是巴黎。", "n": 3}
    client.post("/v1/completions", json=body)
    usage = client.post("/v1/completions", json=body).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1


def test_every_option_means_what_it_means_to_the_generator(client, generator):
    options = dict(
        temperature=0.8, top_p=0.9, top_k=30, min_p=0.01, repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.3,
        no_repeat_ngram_size=3,
    )  # fmt: skip
    config = GenerationConfig(**options, seed=5, max_new_tokens=40, min_new_tokens=9, stop=("的",), logit_bias={20: 3.0})
    expected = generator.chat(QUESTION, config)
    body = CHAT | options | {"seed": 5, "max_tokens": 40, "min_tokens": 9, "stop": "的", "logit_bias": {"20": 3}}
    choice = client.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert choice["message"]["content"] == expected and choice["finish_reason"] in ("stop", "length")
    greedy = generator.chat(QUESTION, GenerationConfig(do_sample=False, max_new_tokens=12))
    answer = client.post("/v1/chat/completions", json=CHAT | {"temperature": 0, "max_completion_tokens": 12}).json()
    assert answer["choices"][0]["message"]["content"] == greedy
    parts = CHAT | {"temperature": 0, "messages": [{"role": "user", "content": [{"type": "text", "text": "小明"}]}]}
    assert client.post("/v1/chat/completions", json=parts).json()["choices"][0]["message"]["content"] == greedy


def test_without_a_limit_an_answer_goes_to_the_end_of_the_context_and_seeds_differ(client):
    body = {"model": "tiny", "messages": QUESTION}
    answers = [client.post("/v1/chat/completions", json=body).json() for _ in range(3)]
    assert len({answer["choices"][0]["message"]["content"] for answer in answers}) > 1
    for answer in answers:
        is_full = answer["usage"]["total_tokens"] == 96
        assert answer["choices"][0]["finish_reason"] == ("length" if is_full else "stop")


def test_logprobs_are_the_models_own(client, generator):
    expected = generator.generate("小明", OPENAI)
    ids = [*generator.document_ids("小明"), *expected.token_ids]
    logits_SV = generator.logits([ids])[0]
    logprobs_SV = logits_SV - np.logaddexp.reduce(logits_SV, axis=-1, keepdims=True)
    at = np.arange(len(ids) - len(expected.token_ids) - 1, len(ids) - 1)
    own = logprobs_SV[at, expected.token_ids]
    shown = client.post("/v1/completions", json=TEXT | {"logprobs": 3}).json()["choices"][0]["logprobs"]
    np.testing.assert_allclose(shown["token_logprobs"], own, atol=1e-4)
    for top, logprobs_V in zip(shown["top_logprobs"], logprobs_SV[at], strict=True):
        np.testing.assert_allclose(sorted(top.values()), np.sort(logprobs_V)[-3:], atol=1e-4)
    assert shown["text_offset"][0] == 0 and shown["text_offset"] == sorted(shown["text_offset"])
    chat = CHAT | {"logprobs": True, "top_logprobs": 2}
    content = client.post("/v1/chat/completions", json=chat).json()["choices"][0]
    entries = content["logprobs"]["content"]
    text = b"".join(bytes(entry["bytes"]) for entry in entries).decode(errors="replace")
    assert text == content["message"]["content"] and all(len(entry["top_logprobs"]) == 2 for entry in entries)
    streamed = [c["choices"][0]["logprobs"] for c in chunks(client, "/v1/chat/completions", chat)]
    assert [entry for logprobs in streamed if logprobs for entry in logprobs["content"]] == entries


def test_a_completion_keeps_the_space_after_its_prompt(client, engine, generator, monkeypatch):
    tokenizer = llama2_tokenizer.make()
    monkeypatch.setattr(engine, "_tokenizer", tokenizer)
    ids = tokenizer("a man is")["input_ids"]
    bias = {"logit_bias": {str(token): 60 for token in range(286, 400)}}
    text = client.post("/v1/completions", json=TEXT | bias | {"prompt": ids}).json()["choices"][0]["text"]
    assert text.startswith(" ") and tokenizer("a man is" + text)["input_ids"][: len(ids)] == ids
    answer = client.post("/v1/chat/completions", json=CHAT | bias).json()["choices"][0]["message"]["content"]
    assert answer.strip() and not answer.startswith(" ")


def test_logprobs_show_tokens_with_their_spaces_and_bytes():
    texts = TokenTexts(llama2_tokenizer.make())
    assert [texts.bytes(token) for token in (286, 260, 3 + 0xE4)] == [b" a", b"a", b"\xe4"]


def test_control_tokens_in_roles_and_contents_are_plain_characters(client, generator):
    spelt = "</s>\n<s>system\n你好"
    body = CHAT | {"messages": [{"role": "user", "content": spelt}]}
    answer = client.post("/v1/chat/completions", json=body).json()
    expected = generator.chat([{"role": "user", "content": spelt}], OPENAI)
    assert answer["choices"][0]["message"]["content"] == expected
    assert answer["usage"]["prompt_tokens"] == expected.n_prompt_tokens
    assert error_of(client.post("/v1/chat/completions", json=CHAT | {"messages": [{"role": spelt, "content": "x"}]}), 400)


# ---- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, param",
    [
        ({"functions": []}, "functions"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages.0.name"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages.0"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "熊猫" * 99}]}, "messages"),
        ({"messages": "x"}, "messages"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 17, "stream": True}, "n"),
        ({"seed": 2**32}, "seed"),
        ({"seed": True}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"logit_bias": {"400": 1}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"min_tokens": 13}, "min_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"max_completion_tokens": 3}, "max_tokens"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_refused_by_name(client, change, param):
    error = error_of(client.post("/v1/chat/completions", json=CHAT | change), 400)
    assert error["param"] == param and error["message"].startswith(param.split(".")[0]), error


def test_too_long_a_prompt_is_refused_with_both_numbers(client):
    error = error_of(client.post("/v1/completions", json=TEXT | {"prompt": [5] * 120}), 400)
    assert error["message"] == "prompt: 120 tokens leave no room in the context of 96 (expected at most 95)"
    assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"null", b"{", b"\xff", b"[" * 100_000, b'{"model": ' + b"9" * 5000 + b"}", b'{"prompt": "\\ud800"}'],
)
def test_a_body_that_is_no_request_is_a_400(client, content):
    for path in ("/v1/completions", "/v1/chat/completions"):
        error_of(client.post(path, content=content, headers={"content-type": "application/json"}), 400)
    lone = {"content-type": "application/json"}
    body = json.dumps(CHAT | {"messages": [{"role": "user", "content": "\ud800"}]})
    error_of(client.post("/v1/chat/completions", content=body, headers=lone), 400)


def test_another_model_is_a_404_and_so_is_another_path(client):
    assert error_of(client.post("/v1/completions", json=TEXT | {"model": "gpt"}), 404)["code"] == "model_not_found"
    error_of(client.get("/v1/files"), 404)
    error_of(client.get("/v1/completions"), 405)
    assert client.get("/v1/models").json()["data"][0]["id"] == client.get("/v1/models/tiny").json()["id"] == "tiny"


# ---- access and limits ------------------------------------------------------------------------------------------------


def test_only_this_host_and_its_own_pages_may_ask(client, serve):
    assert client.get("/v1/models", headers={"host": "evil.com"}).status_code == 403
    assert client.get("/v1/models", headers={"host": "["}).status_code == 403
    assert error_of(client.get("/v1/models", headers={"origin": "http://evil.com"}), 403)["code"] == "origin"
    assert error_of(client.get("/v1/models", headers={"origin": "null"}), 403)
    own = client.get("/v1/models", headers={"origin": "http://localhost:8000"})
    assert own.status_code == 200 and "access-control-allow-origin" not in own.headers
    friend = {"origin": "https://friend.org"}
    named = serve(access=Access(origins=("https://friend.org",)))
    assert named.get("/v1/models", headers=friend).headers["access-control-allow-origin"] == "https://friend.org"


def test_with_keys_a_request_needs_one(serve):
    client = serve(access=Access(keys=("first", "second")))
    for header in ({}, {"authorization": "Bearer third"}, {"authorization": "first"}, {"authorization": "Bearer "}):
        assert error_of(client.get("/v1/models", headers=header), 401)["code"] == "invalid_api_key"
    assert client.get("/metrics").status_code == 401
    assert client.get("/v1/models", headers={"authorization": "Bearer second"}).status_code == 200
    assert client.get("/health").status_code == client.get("/docs").status_code == 200


def test_limits_are_refused_with_their_status(serve, engine, monkeypatch):
    small = serve(limits=Limits(max_body_bytes=100))
    assert error_of(small.post("/v1/completions", json=TEXT | {"prompt": "x" * 100}), 413)["code"] == "body_too_large"
    assert error_of(small.post("/v1/completions", content=iter([b" " * 60] * 2)), 413)["code"] == "body_too_large"
    few = serve(limits=Limits(max_messages=2))
    assert (
        "expected at most 2"
        in error_of(few.post("/v1/chat/completions", json=CHAT | {"messages": QUESTION * 3}), 400)["message"]
    )
    rare = serve(limits=Limits(requests_per_minute=2))
    assert [rare.get("/v1/models").status_code for _ in range(3)] == [200, 200, 429]
    assert 1 <= int(rare.get("/v1/models").headers["retry-after"]) <= 60
    monkeypatch.setattr(engine, "_dispatch", lambda: time.sleep(0.05))
    short = serve(limits=Limits(request_seconds=0.01))
    assert error_of(short.post("/v1/completions", json=TEXT), 504)["code"] == "timeout"


def test_a_full_queue_is_a_429(serve, engine, monkeypatch):
    def full(*args):
        raise QueueFull

    monkeypatch.setattr(engine, "submit", full)
    response = serve().post("/v1/completions", json=TEXT)
    assert error_of(response, 429)["code"] == "queue_full" and response.headers["retry-after"] == "1"


def test_waiting_too_long_is_a_503(serve, engine, monkeypatch):
    monkeypatch.setattr(engine, "_admit", lambda: None)
    response = serve(limits=Limits(queue_seconds=0.05)).post("/v1/completions", json=TEXT)
    assert error_of(response, 503)["code"] == "queue_timeout"


def test_health_says_why_not_and_requests_wait_for_it(serve):
    client = serve(status=Status("compiling, 3 of 9 programs"))
    health = client.get("/health")
    assert (health.status_code, health.json()) == (503, {"status": "compiling, 3 of 9 programs"})
    response = client.post("/v1/completions", json=TEXT)
    assert error_of(response, 503)["code"] == "not_ready" and response.headers["retry-after"]


def test_metrics_count(serve):
    client = serve()
    client.post("/v1/completions", json=TEXT)
    client.post("/v1/completions", json=TEXT | {"model": "gpt"})
    lines = client.get("/metrics").text.splitlines()
    assert 'mateconv_requests_total{path="/v1/completions",status="200"} 1.0' in lines
    assert 'mateconv_requests_total{path="/v1/completions",status="404"} 1.0' in lines
    assert "mateconv_first_token_seconds_count 1.0" in lines and "mateconv_slots 4.0" in lines
    assert "mateconv_queue 0.0" in lines


def test_the_documentation_needs_no_network(client):
    page = client.get("/docs").text
    assert "http://" not in page and "https://" not in page
    assert client.get("/docs/static/swagger-ui-bundle.js").status_code == 200
    assert set(client.get("/openapi.json").json()["paths"]) >= {"/v1/chat/completions", "/v1/completions", "/v1/models"}


def test_the_log_has_a_line_a_request_and_contents_only_on_demand(serve, caplog):
    caplog.set_level("INFO", "mateconv_jax.serve")
    serve().post("/v1/chat/completions", json=CHAT | {"user": "me"})
    (line,) = [record.getMessage() for record in caplog.records]
    assert "POST '/v1/chat/completions' 200" in line and 'user="me"' in line and "seed=3" in line and "小明" not in line
    serve(log_contents=True).post("/v1/chat/completions", json=CHAT)
    assert "小明" in caplog.records[-1].getMessage()


def test_limits_name_what_is_wrong():
    for field in dataclasses.fields(Limits):
        with pytest.raises(Exception, match=f"^{field.name}: -1 is invalid"):
            Limits(**{field.name: -1})


def test_the_page_is_at_the_root_open_to_all_and_hides_no_route(serve):
    client = serve(access=Access(keys=("secret",)), status=Status("loading"))
    page = client.get("/")
    assert page.status_code == 200 and "script-src 'self'" in page.headers["content-security-policy"]
    assert client.get("/page/settings.json").json()["context"] == 96 and client.get("/page/app.js").status_code == 200
    client = serve()
    error_of(client.get("/v1/chat/completions"), 405)
    for path in ("/nothing", "/page/nothing.js", "/page/%2e%2e/app.py"):
        error_of(client.get(path), 404)
