"""One tiny model, one engine, one application for all tests of serving in this process."""

import pytest

from mateconv_jax import TextGenerator
from mateconv_jax.data.tokenizer import tokenizer as tokenizer_lib
from mateconv_jax.inference.engine import Engine
from tests import llama


@pytest.fixture(scope="session")
def generator(dataset_folder):
    return TextGenerator(llama.peaked_model(max_seq_len=96), tokenizer_lib.load(dataset_folder / "tokenizer", ""))


@pytest.fixture(scope="session")
def engine(generator):
    engine = Engine(generator, max_batch=4)
    engine.start()
    yield engine
    engine.stop()
