"""GGUF, llama.cpp's file of weights, configuration and tokenizer: written for it, and read whoever wrote it.

Architecture `llama`, or `qwen3` with norms of queries and keys. llama.cpp's rotary embedding of `llama` pairs neighbouring
features (2j, 2j + 1), so those files hold the rows of queries and keys in that order; of `qwen3` it pairs (j, j + N/2).
"""

import functools
import json
import math
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
from flax import nnx
from gguf import GGMLQuantizationType as Type
from ml_collections import ConfigDict
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mateconv_jax.errors import UserError
from mateconv_jax.interop import hf_config, weight_mapping
from mateconv_jax.interop.stored_model import Model, load_tokenizer
from mateconv_jax.interop.weight_mapping import Tensor
from mateconv_jax.model.rope import rope_frequencies

ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen3": gguf.MODEL_ARCH.QWEN3}
# {--dtype: what matrices are written as, general.file_type}. Norms stay float32, as llama.cpp wants them.
DTYPES = {
    "float32": (Type.F32, gguf.LlamaFileType.ALL_F32),
    "float16": (Type.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bfloat16": (Type.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
ROPE_FACTORS = "rope_freqs.weight"  # Llama 3's rope scaling: what each pair's frequency is divided by, (N/2,)
# Of which a file does not say the settings; these are Llama 3.1's and 3.2's.
LLAMA3 = dict(rope_low_freq_factor=1.0, rope_high_freq_factor=4.0, rope_original_max_seq_len=8192)
# Kinds of token in tokenizer.ggml.token_type.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # {in transformers: in tokenizer.ggml.*_token_id}

# How text is split before merging, by llama.cpp's name: (normaliser, pre-tokeniser, whether a piece that is a token is left
# whole whatever the merges say). llama.cpp has no normaliser: for text that is not in NFC its ids may be others.
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)
_LLAMA3, _QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in (r"\p{N}{1,3}", r"\p{N}")
)
PRE_TOKENIZERS = {
    "gpt-2": (None, _WORDS, False),
    "smollm": (None, pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _WORDS]), False),
    "llama-bpe": (None, pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_LLAMA3), "isolated"), _BYTES]), True),
    "qwen2": (
        normalizers.NFC(), pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_QWEN2), "isolated"), _BYTES]), False,
    ),
}  # fmt: skip


def is_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


# ---- reading ------------------------------------------------------------------------------------------------------


def open_gguf(path: Path, key: str, tokenizer: str | Path | None, n_heads: int | None) -> Model:
    """Its tensors are read, and dequantised to float32, when they are asked for, array by array.

    A tokenizer of another kind than ours, SentencePiece for one, is not read: a line on standard error says so, and
    `tokenizer` is None.

    Raises:
      UserError: a broken file; an architecture or a quantisation that is not known.
    """
    file = _File(path, key)
    config = _configuration(file)
    return Model(
        path=path,
        config=config,
        tokenizer=load_tokenizer(tokenizer, None, key) if tokenizer else _read_tokenizer(file),
        has_ema=False,
        step=None,
        read=lambda abstract_params, _: weight_mapping.from_hf(
            _tensors(file, config.model), config.model, abstract_params, str(path)
        ),
    )


class _File:
    """path. tensors: {name: ReaderTensor}, none of which is read yet."""

    def __init__(self, path: Path, key: str):
        self.path = path
        try:
            self._reader = gguf.GGUFReader(path)
        except Exception as error:  # whatever a broken file makes it do
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{key}: {path} is not read ({reason}; expected a whole GGUF file)") from error
        self.tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        for tensor in self.tensors.values():
            try:
                gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[tensor.tensor_type][1]), np.uint8), tensor.tensor_type)
            except NotImplementedError as error:
                raise UserError(
                    f"{path}: the tensor {tensor.name} is quantised as {tensor.tensor_type.name}, which the package gguf does "
                    "not read (expected F32, F16, BF16, Q8_0, Q4_0 or Q4_1)"
                ) from error

    def get(self, name: str, default: Any = None) -> Any:
        """A value, or a list of values, of the file's header."""
        field = self._reader.get_field(name)
        return default if field is None else field.contents()

    def number(self, name: str, default: int | float | None = None) -> int | float:
        """A value that has to be there. float32 in the file: 1e-5, not 9.99999975e-06."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{self.path}: {name} is {'missing' if value is None else repr(value)} (expected a number)")
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.tensors:
            raise UserError(f"{self.path}: the tensor {name} is missing")
        return tuple(int(size) for size in reversed(self.tensors[name].shape))  # GGUF has the last axis first

    def read(self, name: str) -> np.ndarray:
        tensor = self.tensors[name]
        return gguf.dequantize(tensor.data, tensor.tensor_type).reshape(self.shape(name))


def _configuration(file: _File) -> ConfigDict:
    architecture = file.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UserError(f"{file.path}: general.architecture is {architecture!r} (expected {' or '.join(ARCHITECTURES)})")

    def number(name: str, default=None):
        return file.number(f"{architecture}.{name}", default)

    n_heads = number("attention.head_count")
    model = {
        "dim": number("embedding_length"),
        "n_layers": number("block_count"),
        "n_heads": n_heads,
        "n_kv_heads": number("attention.head_count_kv", n_heads),
        "head_dim": file.get(f"{architecture}.attention.key_length"),
        "hidden_dim": number("feed_forward_length"),
        "vocab_size": file.shape("token_embd.weight")[0],
        "max_seq_len": number("context_length"),
        "norm_eps": number("attention.layer_norm_rms_epsilon"),
        "rope_theta": number("rope.freq_base", 10_000.0),
        "qk_norm": architecture == "qwen3",
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    config = hf_config.configuration(model, str(file.path))
    # Settings of which this model has only one.
    only = {
        "split.count": 1,
        f"{architecture}.expert_count": 0,
        f"{architecture}.attention.value_length": config.model.head_dim,
        f"{architecture}.attention.sliding_window": 0,
        f"{architecture}.rope.dimension_count": config.model.head_dim,
        f"{architecture}.rope.scaling.type": "none",
    }
    for name, expected in only.items():
        if (value := file.get(name, expected)) != expected:
            raise UserError(f"{file.path}: {name} is {value!r} (expected {expected!r}: this model has no other)")
    if ROPE_FACTORS not in file.tensors:
        return config
    factors_n = file.read(ROPE_FACTORS)
    original = number("rope.scaling.original_context_length", LLAMA3["rope_original_max_seq_len"])
    model |= LLAMA3 | {"rope_factor": float(factors_n.max()), "rope_original_max_seq_len": original}
    config = hf_config.configuration(model, str(file.path))
    expected_n = _rope_factors(config.model)
    if factors_n.shape != expected_n.shape or not np.allclose(factors_n, expected_n, rtol=1e-4, atol=0):
        raise UserError(
            f"{file.path}: {ROPE_FACTORS} is not Llama 3's scaling (expected rope_type 'llama3' with low_freq_factor 1, "
            f"high_freq_factor 4 and original_max_position_embeddings {original})"
        )
    return config


def _rope_factors(model: ConfigDict) -> np.ndarray:
    plain = model.copy_and_resolve_references()
    plain.rope_factor = 1.0
    return rope_frequencies(plain) / rope_frequencies(model)


def _tensors(file: _File, c: ConfigDict) -> dict[str, Tensor]:
    """By Hugging Face's names; one that has none there keeps its own."""
    hf_names = {theirs: ours for ours, theirs in _gguf_names(c).items()}
    tensors = {}
    for name in file.tensors:
        hf_name, tensor = hf_names.get(name, name), Tensor(file.shape(name), functools.partial(file.read, name))
        if name != ROPE_FACTORS:
            tensors[hf_name] = (
                weight_mapping.half_split(tensor, c.head_dim)
                if hf_name.endswith(weight_mapping.TURNED) and not c.qk_norm
                else tensor
            )
    return tensors


def _gguf_names(c: ConfigDict) -> dict[str, str]:
    """{Hugging Face's name: GGUF's}"""
    table = gguf.get_tensor_name_map(ARCHITECTURES["qwen3" if c.qk_norm else "llama"], c.n_layers)
    names = {name: table.get_name(name, (".weight",)) for parts in weight_mapping.parts(c).values() for name, _ in parts}
    return {name: theirs for name, theirs in names.items() if theirs is not None}


def _read_tokenizer(file: _File) -> PreTrainedTokenizerFast | None:
    kind, name = file.get("tokenizer.ggml.model"), file.get("tokenizer.ggml.pre")
    if kind != "gpt2" or name not in PRE_TOKENIZERS:
        wrong = f"model is {kind!r} (expected 'gpt2', a byte-level BPE" if kind != "gpt2" else f"pre is {name!r} ("
        print(
            f"{file.path}: its tokenizer is not read, since tokenizer.ggml.{wrong}; give another with --tokenizer)",
            file=sys.stderr,
        )
        return None
    normalizer, pre_tokenizer, ignore_merges = PRE_TOKENIZERS[name]
    tokens = file.get("tokenizer.ggml.tokens", [])
    kinds = file.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    merges = [tuple(merge.split(" ")) for merge in file.get("tokenizer.ggml.merges", [])]
    try:
        vocabulary = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != UNUSED}
        bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges, ignore_merges=ignore_merges))
        ids = {key: file.get(f"tokenizer.ggml.{theirs}_token_id") for key, theirs in SPECIAL.items()}
        special = {f"{key}_token": tokens[i] for key, i in ids.items() if i is not None}
    except Exception as error:  # the library raises bare Exception for merges of unknown tokens
        raise UserError(f"{file.path}: cannot read the tokenizer ({error}; give another with --tokenizer)") from error
    if "eos_token" not in special:
        raise UserError(f"{file.path}: the tokenizer has no end token (give another with --tokenizer)")
    # Where documents do not begin with it, as SmolLM2's and Qwen3's, it is none. Of Llama 3's files some do not say so.
    if not file.get("tokenizer.ggml.add_bos_token", name == "llama-bpe"):
        special.pop("bos_token", None)
    bpe.normalizer, bpe.pre_tokenizer, bpe.decoder = normalizer, pre_tokenizer, tokenizers.decoders.ByteLevel()
    added = {}
    for kind in (CONTROL, USER_DEFINED):
        added[kind] = [token for token, its_kind in zip(tokens, kinds, strict=True) if its_kind == kind]
        bpe.add_tokens([tokenizers.AddedToken(token, special=kind == CONTROL, normalized=False) for token in added[kind]])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        chat_template=file.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        extra_special_tokens=[token for token in added[CONTROL] if token not in special.values()],
        **special,
    )


# ---- writing ------------------------------------------------------------------------------------------------------


def write_gguf(path: Path, model: Model, params: nnx.State, dtype: str) -> None:
    """Array by array.

    Args:
      params: float32.
      dtype: of matrices, one of DTYPES.

    Raises:
      UserError: a mixture of experts; what llama.cpp has not: the tokenizer's way of splitting text, Llama 3's rope scaling
        together with norms of queries and keys; rows that q8_0 cannot have.
    """
    c, tokenizer = model.config.model, model.tokenizer
    assert tokenizer is not None  # convert has refused
    if c.use_moe:
        raise UserError("--to: no .gguf file, model.use_moe is True (expected False: write a Hugging Face folder)")
    if c.qk_norm and c.rope_factor != 1:
        raise UserError(f"--to: no .gguf file, model.rope_factor is {c.rope_factor} (llama.cpp's qwen3 has no such scaling)")
    matrix_type, file_type = DTYPES[dtype]
    writer = gguf.GGUFWriter(None, "qwen3" if c.qk_norm else "llama")
    _add_sizes(writer, path.stem, c, file_type)
    _add_tokenizer(writer, tokenizer, c.vocab_size)

    gguf_names = _gguf_names(c)
    tensors = {
        gguf_names[name]: weight_mapping.interleaved(tensor, c.head_dim)
        if name.endswith(weight_mapping.TURNED) and not c.qk_norm
        else tensor
        for name, tensor in weight_mapping.to_hf(params, c).items()
    }
    if c.rope_factor != 1:
        writer.add_rope_scaling_orig_ctx_len(c.rope_original_max_seq_len)
        tensors[ROPE_FACTORS] = Tensor((c.head_dim // 2,), functools.partial(_rope_factors, c))
    types = {name: matrix_type if len(tensor.shape) > 1 else Type.F32 for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        block_size = gguf.GGML_QUANT_SIZES[types[name]][0]
        if tensor.shape[-1] % block_size:
            raise UserError(f"--dtype: {dtype} takes rows of {block_size} numbers; those of {name} have {tensor.shape[-1]}")
        byte_shape = gguf.quant_shape_to_byte_shape(tensor.shape, types[name])
        writer.add_tensor_info(name, byte_shape, np.dtype(np.uint8), math.prod(byte_shape), types[name])
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in tensors.items():
            with np.errstate(over="ignore"):
                array = gguf.quantize(tensor.read(), types[name])
            if types[name] == Type.F16 and not np.isfinite(array).all():
                raise UserError("--dtype: float16 has no number as large as one of the weights (expected bfloat16 or float32)")
            writer.write_tensor_data(array)
    finally:
        writer.close()


def _add_sizes(writer: gguf.GGUFWriter, name: str, c: ConfigDict, file_type: gguf.LlamaFileType) -> None:
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(c.vocab_size)
    writer.add_context_length(c.max_seq_len)
    writer.add_embedding_length(c.dim)
    writer.add_block_count(c.n_layers)
    writer.add_feed_forward_length(c.hidden_dim)
    writer.add_head_count(c.n_heads)
    writer.add_head_count_kv(c.n_kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> None:
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    bpe = backend["model"]
    if bpe["type"] != "BPE" or bpe["byte_fallback"] or backend["decoder"]["type"] != "ByteLevel":
        raise UserError(f"--to: no .gguf file, it has no place for this tokenizer, a {bpe['type']} (expected a byte-level BPE)")
    if not bpe["merges"]:
        raise UserError("--to: no .gguf file, the tokenizer merges nothing, and llama.cpp takes none like that")
    splitting = _splitting(tokenizer.backend_tokenizer)
    known = {}
    for name, (normalizer, pre_tokenizer, ignore_merges) in PRE_TOKENIZERS.items():
        other = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=ignore_merges))
        other.normalizer, other.pre_tokenizer = normalizer, pre_tokenizer
        known[name] = _splitting(other)
    name = next((name for name in known if known[name] == splitting), None)
    if name is None:
        raise UserError(
            f"--to: no .gguf file, llama.cpp has no name for how this tokenizer splits text (expected the way of "
            f"{', '.join(PRE_TOKENIZERS)}; here it is {json.dumps(backend['pre_tokenizer'])[:200]})"
        )
    pieces = {i: token for token, i in tokenizer.get_vocab().items()}
    kinds = {i: CONTROL if token.special else USER_DEFINED for i, token in tokenizer.added_tokens_decoder.items()}
    ids = range(vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list([pieces.get(i, f"[PAD{i}]") for i in ids])  # the model may have rows for more
    writer.add_token_types([kinds.get(i, NORMAL) if i in pieces else UNUSED for i in ids])
    writer.add_token_merges([" ".join(merge) for merge in bpe["merges"]])
    for key, theirs in SPECIAL.items():
        if (i := getattr(tokenizer, f"{key}_token_id")) is not None:
            writer.add_uint32(f"tokenizer.ggml.{theirs}_token_id", i)
    writer.add_add_bos_token(tokenizer.bos_token_id is not None)  # a document starts with it, and so does a prompt
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)


def _splitting(tokenizer: tokenizers.Tokenizer) -> tuple:
    """What decides how text is split before merging."""

    def without_offsets(part):
        if isinstance(part, dict):
            return {name: without_offsets(value) for name, value in part.items() if name != "trim_offsets"}
        return [without_offsets(value) for value in part] if isinstance(part, list) else part

    backend = json.loads(tokenizer.to_str())
    return without_offsets(backend["normalizer"]), without_offsets(backend["pre_tokenizer"]), backend["model"]["ignore_merges"]
