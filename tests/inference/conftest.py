import pytest

from mateconv_jax import TextGenerator
from mateconv_jax.data.tokenizer import tokenizer as tokenizer_lib
from tests import llama


@pytest.fixture(scope="module")
def model():
    return llama.peaked_model(max_seq_len=96)


@pytest.fixture(scope="module")
def generator(model, dataset_folder):
    return TextGenerator(model, tokenizer_lib.load(dataset_folder / "tokenizer", ""))
