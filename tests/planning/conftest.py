from importlib.util import find_spec

import pytest

from mateconv_jax import config as config_lib
from mateconv_jax.planning import programs, target
from mateconv_jax.training import setup

needs_compiler = pytest.mark.skipif(
    not (find_spec("jax_plugins") and find_spec("jax_plugins.xla_cuda13")), reason="XLA's CUDA compiler is not installed"
)


def base_config(model=(), **training):
    """The base model, 32 x 512 tokens on each of 8 devices, EMA on."""
    config = config_lib.default_config()
    config.model.update(dict(model))
    config.training.update(dict(batch_size=256, use_ema=True) | training)
    return config


def compile_step(config, gpu="h100", devices=8, hosts=1):
    config = config_lib.resolve(config)
    with target.compiling_for(target.GPUS[gpu]):
        c = setup.model_config(config, target.GPUS[gpu].device)
        run = programs.training_step(config, c, target.devices(target.GPUS[gpu], devices, hosts), 1000)
        return programs.compile_step(run)


@pytest.fixture(scope="session")
def base_step():
    """The base model's training step, compiled for 8 H100."""
    return compile_step(base_config())
