"""Requests made from the OpenAPI schema, valid and not: no answer is a 5xx, and what is refused is in OpenAI's error shape."""

import collections

import pytest
import schemathesis
from hypothesis import HealthCheck, settings

from mateconv_jax.serving.app import Service, make_app
from mateconv_jax.serving.guard import Status

pytestmark = pytest.mark.slow
STATUSES = collections.Counter()


@pytest.fixture(scope="module")
def described(generator, engine):
    app = make_app(Service(generator, engine, "tiny", 4, status=Status(None)))
    yield schemathesis.openapi.from_asgi("/openapi.json", app)
    print(f"fuzzed requests by status: {dict(STATUSES)}")
    assert STATUSES[200] > 20 and STATUSES[400] > 100  # both kinds were made


api = schemathesis.pytest.from_fixture("described")


@api.parametrize()
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_request_is_a_5xx(case, engine):
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = "tiny"  # else nearly all are of unknown models
    response = case.call()
    STATUSES[response.status_code] += 1
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert engine.is_running and engine.counters.failed_dispatches == 0
