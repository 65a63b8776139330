import jax
import pytest

from mateconv_jax import config as config_lib
from mateconv_jax.errors import UserError
from mateconv_jax.training import loop

# What jax 0.11.2 raised on an H100 for 4,096 rows of the base model.
MESSAGE = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 276.17GiB. [tf-allocator-allocation-error='']"


def failing(message):
    def lower(*_):
        raise jax.errors.JaxRuntimeError(message)

    return lower


def test_out_of_memory_is_one_line_that_names_the_keys_to_lower(tiny_config, monkeypatch):
    monkeypatch.setattr(loop, "lower", failing(MESSAGE))
    with pytest.raises(UserError, match=r"training.batch_size: out of memory .*276.17GiB.*training.remat=full") as error:
        loop.train(config_lib.resolve(tiny_config))
    assert "\n" not in str(error.value)


def test_other_failures_of_the_device_stay_what_they_are(tiny_config, monkeypatch):
    monkeypatch.setattr(loop, "lower", failing("INTERNAL: an illegal memory access was encountered"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="illegal memory access"):
        loop.train(config_lib.resolve(tiny_config))
