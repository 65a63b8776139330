"""Requests made from the OpenAPI schema, valid and not: no answer is a 5xx, and what is refused is in OpenAI's error shape."""

import collections

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

from mateconv_jax.serving.app import Service, make_app
from mateconv_jax.serving.guard import Status

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def schema(generator, engine):
    app = make_app(Service(generator, engine, "tiny", 4, status=Status(None)))
    return schemathesis.openapi.from_asgi("/openapi.json", app)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["valid", "invalid"])
def test_no_request_is_a_5xx(schema, engine, path, mode):
    statuses = collections.Counter()

    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
    @given(schema[path]["POST"].as_strategy(generation_mode=mode))
    def ask(case):
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "tiny"  # else nearly all are of unknown models
        response = case.call()
        statuses[response.status_code] += 1
        assert response.status_code < 500, response.text
        if response.status_code >= 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert engine.is_running and engine.counters.failed_dispatches == 0

    ask()
    print(f"{path}, {mode.name}: {dict(statuses)}")
    assert sum(statuses.values()) >= 100 and (mode == GenerationMode.POSITIVE or statuses[400] > 50)
    assert mode == GenerationMode.NEGATIVE or statuses[200] > 10
