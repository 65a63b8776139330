"""PyTorch MateConv's .pth files, in and out."""

import pickle

import numpy as np
import pytest
import torch
import transformers

from mateconv_jax import TextGenerator
from mateconv_jax.errors import UserError
from mateconv_jax.interop import formats, pytorch, weight_mapping
from mateconv_jax.interop.weight_mapping import Tensor
from tests import mateconv_torch

TOKENS_BS = np.random.default_rng(0).integers(0, 96, (2, 60))


@pytest.fixture(scope="module")
def theirs():
    return mateconv_torch.random_model()


def logits_of(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS_BS)).numpy()


def saved(content, folder, **options):
    torch.save(content, folder / "model.pth", **options)
    return folder / "model.pth"


def assert_same_logits(path, theirs, **options):
    expected_BSV = logits_of(theirs)
    assert np.abs(expected_BSV).max() > 1
    ours_BSV = TextGenerator.from_pretrained(path, **options).logits(TOKENS_BS)
    np.testing.assert_allclose(ours_BSV, expected_BSV, atol=1e-4)
    return ours_BSV


def test_a_state_dict_gives_pytorchs_logits(theirs, tmp_path):
    path = saved(theirs.state_dict(), tmp_path)
    assert_same_logits(path, theirs)
    model = formats.open_model(path, "x").config.model
    shape = (model.dim, model.n_layers, model.n_heads, model.n_kv_heads, model.hidden_dim, model.vocab_size, model.max_seq_len)
    assert shape == (64, 2, 16, 8, 192, 96, 512) and model.tie_word_embeddings and not model.qk_norm


def test_of_a_training_checkpoint_the_ema_counts_unless_the_raw_weights_are_asked_for(theirs, tmp_path):
    """With DistributedDataParallel's prefix, torch.compile's, and what an optimizer keeps."""
    ema = mateconv_torch.random_model(seed=1)
    optimizer = torch.optim.AdamW(theirs.parameters())
    logits_of(theirs)
    checkpoint = {
        "model_state_dict": {f"module._orig_mod.{name}": weight for name, weight in theirs.state_dict().items()},
        "optimizer_state_dict": optimizer.state_dict(),
        "ema_shadow": dict(ema.named_parameters()),  # where tied weights have one name
        "epoch": 3,
        "loss": 2.5,
    }
    path = saved(checkpoint, tmp_path)
    assert_same_logits(path, ema)
    assert_same_logits(path, theirs, use_ema=False)


PLACES = {
    "Lightning": lambda state: {"state_dict": {f"model.{name}": w for name, w in state.items()}, "loops": {}},
    "DeepSpeed": lambda state: {"module": state, "optimizer": None},
    "a trainer class": lambda state: {"epoch": 1, "model": {"state_dict": state}},
    "DDP around a wrapper": lambda state: {"net": {f"module.net.{name}": w for name, w in state.items()}},
    "layers compiled one by one": lambda state: {name.replace(".attention", "._orig_mod.attention"): w for name, w in state.items()},
    "only a moving average": lambda state: {"ema": {"shadow": state, "decay": 0.999}},
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_the_weights_are_found_where_other_trainers_keep_them(theirs, tmp_path, place):
    state = theirs.state_dict()
    found = formats.open_model(saved(PLACES[place](state), tmp_path), "x")
    assert found.config == formats.open_model(saved(state, tmp_path), "x").config and not found.has_ema
    tensors, _ = pytorch._state(pytorch._weights(PLACES[place](state)) or pytorch._weights(PLACES[place](state), pytorch.EMA))
    assert sorted(tensors) == sorted(pytorch._state(state)[0])


def test_a_moving_average_beside_the_weights_is_told_apart(theirs, tmp_path):
    ema = mateconv_torch.random_model(seed=1)
    path = saved({"model": theirs.state_dict(), "model_ema": {"module": ema.state_dict()}}, tmp_path)
    assert formats.open_model(path, "x").has_ema
    state = pytorch._weights(pytorch._load(path, "x"), pytorch.EMA)
    assert torch.equal(state["norm.weight"], ema.state_dict()["norm.weight"])
    assert torch.equal(state["layers.0.attention.wq.weight"], ema.state_dict()["layers.0.attention.wq.weight"])


def test_half_precision_is_read_as_it_is(theirs, tmp_path):
    for dtype in (torch.float16, torch.bfloat16):
        halves = {name: weight.to(dtype) for name, weight in theirs.state_dict().items() if not weight.is_complex()}
        rounded = mateconv_torch.random_model()
        rounded.load_state_dict({name: weight.float() for name, weight in halves.items()}, strict=False)
        assert_same_logits(saved(halves, tmp_path), rounded)


def test_files_of_old_pytorch_versions_are_read(theirs, tmp_path):
    assert_same_logits(saved(theirs.state_dict(), tmp_path, _use_new_zipfile_serialization=False), theirs)


def test_an_output_layer_of_its_own_is_kept(tmp_path):
    theirs = mateconv_torch.random_model()
    theirs.output = torch.nn.Linear(64, 96, bias=False)
    path = saved(theirs.state_dict(), tmp_path)
    assert not formats.open_model(path, "x").config.model.tie_word_embeddings
    assert_same_logits(path, theirs)


@pytest.mark.parametrize("n_shared_experts", [0, 1])
def test_a_mixture_of_experts_gives_pytorchs_logits_and_comes_back(n_shared_experts, tmp_path):
    experts = dict(n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=n_shared_experts)
    theirs = mateconv_torch.random_model(hidden_dim=64, experts=experts)
    path = saved(theirs.state_dict(), tmp_path)
    assert_same_logits(path, theirs)
    formats.convert(path, tmp_path / "again.pth")
    again, state = torch.load(tmp_path / "again.pth", weights_only=True), theirs.state_dict()
    assert again.keys() == state.keys() - {"pos_cis"}
    assert all(torch.equal(again[name], state[name]) for name in again)


def test_minimind_with_hugging_faces_names_is_read_and_written(tmp_path):
    """Its version 3 equals transformers' Qwen3, version 2 its Llama."""
    shape = dict(
        hidden_size=64, num_hidden_layers=2, num_key_value_heads=4, intermediate_size=192, vocab_size=96,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    for kind, options in (
        ("Qwen3", dict(num_attention_heads=4, head_dim=16, rms_norm_eps=1e-6)),
        ("Llama", dict(num_attention_heads=8, rms_norm_eps=1e-5)),
    ):
        config = getattr(transformers, f"{kind}Config")(**shape, **options, initializer_range=0.1)
        theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
        state = {name: weight.clone() for name, weight in theirs.state_dict().items()}
        path = saved(state, tmp_path)
        with torch.no_grad():
            expected_BSV = theirs(torch.tensor(TOKENS_BS)).logits.numpy()
        assert np.abs(expected_BSV).max() > 1
        np.testing.assert_allclose(TextGenerator.from_pretrained(path).logits(TOKENS_BS), expected_BSV, atol=1e-4)
        if kind == "Qwen3":  # the other one is written as MateConv's
            formats.convert(path, tmp_path / "again.pth")
            again = torch.load(tmp_path / "again.pth", weights_only=True)
            assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)


def test_another_number_of_heads_is_given(tmp_path):
    theirs = mateconv_torch.random_model(n_heads=4, n_kv_heads=2)
    path = saved(theirs.state_dict(), tmp_path)
    ours_BSV = assert_same_logits(path, theirs, n_heads=4)
    with_16_BSV = TextGenerator.from_pretrained(path).logits(TOKENS_BS)
    assert np.abs(with_16_BSV - ours_BSV).max() > 0.1
    with pytest.raises(UserError, match="--n_heads: 24 does not fit .*64 features and keys 32"):
        formats.open_model(path, "x", n_heads=24)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_is_what_pytorch_reads(theirs, dtype, tmp_path):
    """Through our parameters and back: every tensor bit-identical, both names of the tied one there."""
    state = {name: weight.to(getattr(torch, dtype)) for name, weight in theirs.state_dict().items() if not weight.is_complex()}
    formats.convert(saved(state, tmp_path), tmp_path / "again.pth", dtype=dtype)
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) and again[name].dtype == state[name].dtype for name in state)
    assert again["output.weight"].data_ptr() == again["tok_embeddings.weight"].data_ptr()
    mateconv_torch.Transformer().load_state_dict(again, strict=False)


class Program:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    "content, message",
    [
        ({"model_state_dict": {}, "config": Program()}, "cannot read .*model.pth .it contains print; expected only tensors and plain values"),
        ([1, 2], "holds a list"),
        ({"weight": torch.ones(2)}, "holds weight … .expected a model's tensors"),
        ({"tok_embeddings.weight": torch.ones(4, 4)}, r"model.layers.0.self_attn.q_proj.weight is missing \(in MateConv's names\)"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_model_is_one_clear_error(content, message, tmp_path, capsys):
    with pytest.raises(UserError, match=message):
        formats.open_model(saved(content, tmp_path), "--from")
    assert capsys.readouterr().out == ""


def test_a_pickle_that_wants_to_run_something_is_refused(tmp_path, capsys):
    (tmp_path / "model.pth").write_bytes(pickle.dumps(Program()))
    with pytest.raises(UserError, match="cannot read .*model.pth"):
        formats.open_model(tmp_path / "model.pth", "--from")
    (tmp_path / "model.pth").write_bytes(b"PK\x03\x04 broken")
    with pytest.raises(UserError, match="cannot read .*model.pth"):
        formats.open_model(tmp_path / "model.pth", "--from")
    assert capsys.readouterr().out == ""


def test_a_tensor_too_many_or_too_few_is_said(theirs, tmp_path):
    state = theirs.state_dict()
    read = lambda: TextGenerator.from_pretrained(saved(state, tmp_path))  # noqa: E731
    state["layers.0.attention.bias"] = torch.ones(3)
    with pytest.raises(UserError, match="model.layers.0.self_attn.bias is unknown"):
        read()
    del state["layers.0.attention.bias"], state["layers.1.feed_forward.w2.weight"]
    with pytest.raises(UserError, match="model.layers.1.mlp.down_proj.weight is missing"):
        read()


def test_without_pytorch_the_package_is_named(theirs, tmp_path, monkeypatch):
    path = saved(theirs.state_dict(), tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(UserError, match="pip install torch"):
        formats.open_model(path, "x")


def test_rows_are_permuted_within_each_head():
    w_OD = np.arange(8)[:, None] * np.ones((1, 3))  # two heads of 4
    turned = weight_mapping.interleaved(Tensor(w_OD.shape, lambda: w_OD), 4)
    assert turned.read()[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert np.array_equal(weight_mapping.half_split(turned, 4).read(), w_OD)
