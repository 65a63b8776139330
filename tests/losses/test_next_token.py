import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mateconv_jax.data.dataset import open_dataset
from mateconv_jax.data.tokenizer import tokenizer as tokenizer_lib
from mateconv_jax.losses.next_token import next_token_loss
from mateconv_jax.model.transformer import Transformer
from mateconv_jax.training.step import make_eval_step
from tests import llama


@pytest.fixture(scope="module")
def model():
    """Weights large enough that what a token sees shows."""
    graph, params = nnx.split(Transformer(llama.model_config(vocab_size=400), nnx.Rngs(0)))
    return graph, jax.tree.map(lambda p: 5 * p if p.ndim > 1 else p, params)


@pytest.fixture(scope="module")
def dialogue(dataset_folder):
    """A row in which a question and its answer stand, with document starts; where its `<s>assistant` is."""
    tokenizer = tokenizer_lib.load(dataset_folder / "tokenizer", "")
    rows = open_dataset(dataset_folder, "", 32).rows("train", (tokenizer.bos_token_id, tokenizer.eos_token_id))
    header = [tokenizer.bos_token_id, *tokenizer_lib.encode(tokenizer, ["assistant"])[0]]
    for i in range(len(rows)):
        row = rows.read(np.array([i]))
        tokens = row["tokens"][0].tolist()
        for at in range(10, 28):
            if tokens[at : at + len(header)] == header and not row["document_starts"][0, at - 6 : at + 6].any():
                return row, at
    raise AssertionError("no dialogue")


@pytest.mark.parametrize("mask", [False, True])
def test_an_answer_sees_its_question(model, dialogue, mask):
    """With a document mask too: the template's `<s>` before the answer begins no document."""
    row, at = dialogue
    if not mask:
        row = {name: values for name, values in row.items() if name != "document_starts"}
    eval_step = make_eval_step(model[0], next_token_loss)
    learned = np.zeros(row["tokens"].shape, bool)
    learned[:, at + 1 :] = True  # the answer alone
    another = row["tokens"].copy()
    another[0, at - 4 : at - 2] += 1  # another question
    losses = [float(eval_step(model[1], row | {"tokens": t, "learned": learned})[0]) for t in (row["tokens"], another)]
    assert abs(losses[0] - losses[1]) > 0.01


def test_with_a_document_mask_a_document_does_not_see_the_one_before(model):
    tokens = np.random.default_rng(0).integers(3, 400, (1, 33)).astype(np.uint16)
    starts, learned = np.zeros((2, 1, 33), bool)
    starts[0, 16] = True
    learned[0, 17:] = True
    another = tokens.copy()
    another[0, :16] += 1
    eval_step = make_eval_step(model[0], next_token_loss)
    batch = {"length": np.array([33], np.int32), "learned": learned, "document_starts": starts}
    losses = [float(eval_step(model[1], batch | {"tokens": t})[0]) for t in (tokens, another)]
    assert losses[0] == losses[1]
    del batch["document_starts"]
    assert float(eval_step(model[1], batch | {"tokens": another})[0]) != losses[0]


def test_a_mixtures_routing_counts_what_is_learned():
    c = llama.model_config(use_moe=True, n_layers=1, dim=32, n_heads=4, n_kv_heads=2, hidden_dim=32)
    tokens = jax.random.randint(jax.random.key(0), (2, 13), 0, 96)
    learned = jax.random.bernoulli(jax.random.key(1), 0.5, (2, 13))
    batch = {"tokens": tokens, "length": jnp.array([13, 13]), "learned": learned}
    output = jax.jit(lambda: next_token_loss(Transformer(c, nnx.Rngs(0)), batch))()
    assert float(output.metrics["experts"].chosen_E.sum()) == 2 * float(output.weight) == 2 * int(learned[:, 1:].sum())
