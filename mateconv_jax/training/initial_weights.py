"""The weights of another model that training starts from: training.init_from."""

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerFast

from mateconv_jax.config_keys import KEYS, OnResume
from mateconv_jax.data.tokenizer.tokenizer import fingerprint
from mateconv_jax.errors import UserError
from mateconv_jax.interop.stored_model import StoredModel
from mateconv_jax.interop.weight_mapping import parameter_name
from mateconv_jax.runtime import sharding

ROW_PER_TOKEN = ("embedding_VD", "output_VD")


def check(model: StoredModel, config: ConfigDict, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Compare the model with the one that `config` describes, and its tokenizer with the dataset's.

    Returns:
      A line for the log for each difference that is allowed.

    Raises:
      UserError: the weights do not fit.
    """
    differences = []
    for key in KEYS:
        section, name = key.path.split(".")
        if section != "model" or key.on_resume is not OnResume.FIXED:
            continue
        was, now = model.config.model[name], config.model[name]
        if was == now:
            continue
        if name == "vocab_size" and now > was:
            what = "the embedding" if config.model.tie_word_embeddings else "the embedding and the output layer"
            differences.append(f"the vocabulary grows from {was:,} to {now:,}: the new rows of {what} are the mean of the old")
        elif name == "norm_eps" or name.startswith("rope_"):  # they shape no array: fine-tuning may change them
            differences.append(f"the model differs from the weights' own: {key.path} was {was}, now {now}")
        else:
            expected = f"at least {was}" if name == "vocab_size" else "the same"
            raise UserError(f"{key.path}: {now}, but the weights in {str(model.path)!r} have {was} (expected {expected})")
    if model.tokenizer is not None and fingerprint(model.tokenizer) != fingerprint(tokenizer):
        differences.append(_compare_tokenizers(model.tokenizer, tokenizer, str(model.path)))
    return differences


def _compare_tokenizers(theirs: PreTrainedTokenizerFast, ours: PreTrainedTokenizerFast, path: str) -> str:
    their_ids, our_ids = theirs.get_vocab(), ours.get_vocab()
    changed = sum(our_ids.get(token) != i for token, i in their_ids.items())
    if changed:
        return f"the tokenizer of {path} is not the dataset's: {changed:,} of its token ids stand for other text"
    return f"the dataset's tokenizer is that of {path} with {len(our_ids) - len(their_ids):,} more tokens"


def read(model: StoredModel, abstract_params: nnx.State) -> nnx.State:
    """The model's weights in the shapes and shardings of abstract_params. Rows of tokens that the model does not have are the
    mean of its own (Hewitt, 2021, "Initializing New Word Embeddings for Pretrained Language Models"): a new token's logit is
    then the average one, where a row of zeros may be likelier than every known token.

    Raises:
      UserError: the weights cannot be read.
    """
    n_rows = model.config.model.vocab_size

    def own_shape(path, leaf):
        if parameter_name(path) not in ROW_PER_TOKEN or leaf.shape[0] == n_rows:
            return leaf
        own = jax.ShapeDtypeStruct((n_rows, *leaf.shape[1:]), leaf.dtype)
        return own if leaf.sharding is None else sharding.with_shardings(leaf.sharding.mesh, own)

    def grow(array, leaf):
        if array.shape == leaf.shape:
            return array
        return jax.jit(_with_mean_rows, static_argnums=1, out_shardings=leaf.sharding)(array, leaf.shape[0])

    params = model.params(jax.tree_util.tree_map_with_path(own_shape, abstract_params))
    return jax.tree.map(grow, params, abstract_params)


def _with_mean_rows(array_VD, n_rows: int):
    mean_D = array_VD.mean(axis=0)
    new_shape = (n_rows - array_VD.shape[0], *mean_D.shape)
    return jnp.concatenate([array_VD, jnp.broadcast_to(mean_D, new_shape)])
