"""GGUF, llama.cpp's format for weights, configuration and tokenizer in one file: written for llama.cpp, read from any tool.

Architecture `llama`, `qwen3` with QK norm, `qwen2` with biases. For `llama`, llama.cpp uses rotary pairs (2j, 2j + 1), so those
files hold query and key rows in that order; for the others it uses (j, j + N/2).
"""

import functools
import json
import math
import sys
from pathlib import Path

import gguf
import numpy as np
import tokenizers
from flax import nnx
from gguf import GGMLQuantizationType as Type
from ml_collections import ConfigDict
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mateconv_jax.errors import UserError
from mateconv_jax.interop import gguf_rope, hf_config, weight_mapping
from mateconv_jax.interop.gguf_reader import GGUFFile
from mateconv_jax.interop.stored_model import StoredModel, all_end_ids, load_tokenizer
from mateconv_jax.interop.weight_mapping import Tensor

ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}
# {--dtype: (type of matrices, general.file_type)}. Norms stay float32, as llama.cpp requires.
DTYPES = {
    "float32": (Type.F32, gguf.LlamaFileType.ALL_F32),
    "float16": (Type.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bfloat16": (Type.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
# Values of tokenizer.ggml.token_type.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # {in transformers: in tokenizer.ggml.*_token_id}
FURTHER_ENDS = ("eot", "eom")  # end of turn and of message: llama.cpp ends an answer at these, too

# llama.cpp's pre-tokenizers by name: (normalizer, pre-tokenizer, ignore_merges: keep a piece that is a token whole regardless
# of the merges). llama.cpp has no normalizers, so its ids may differ on text that is not in NFC.
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
    """Whether `path` is a GGUF file, by its magic number."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


# ---- reading ------------------------------------------------------------------------------------------------------


def open_gguf(path: Path, key: str, tokenizer: str | Path | None, n_heads: int | None) -> StoredModel:
    """Open a file; its tensors are read and dequantised to float32 on demand.

    Only byte-level BPE tokenizers are read. For any other, such as SentencePiece, a warning is printed to standard error and
    `tokenizer` is None.

    Raises:
      UserError: a damaged file, or an unsupported architecture or quantisation.
    """
    file = GGUFFile(path, key)
    config = _configuration(file)
    further = (file.get(f"tokenizer.ggml.{name}_token_id") for name in FURTHER_ENDS)
    return StoredModel(
        path=path,
        config=config,
        tokenizer=load_tokenizer(tokenizer, None, key) if tokenizer else _read_tokenizer(file),
        has_ema=False,
        step=None,
        read=lambda abstract_params, _: weight_mapping.from_hf(
            _tensors(file, config.model), config.model, abstract_params, str(path)
        ),
        end_ids=tuple(i for i in further if i is not None),
    )


def _configuration(file: GGUFFile) -> ConfigDict:
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
        "qkv_bias": architecture == "qwen2",
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    config = hf_config.configuration(model, str(file.path))
    # Settings for which this model supports only one value.
    only = {
        "split.count": 1,
        f"{architecture}.expert_count": 0,
        f"{architecture}.attention.value_length": config.model.head_dim,
        f"{architecture}.attention.sliding_window": 0,
        f"{architecture}.rope.dimension_count": config.model.head_dim,
    }
    file.check_only(only)
    return gguf_rope.read(file, architecture, config.model)


def _tensors(file: GGUFFile, c: ConfigDict) -> dict[str, Tensor]:
    """The tensors by Hugging Face name; unknown ones keep their GGUF name."""
    hf_names = {theirs: ours for ours, theirs in _gguf_names(c).items()}
    tensors = {}
    for name in file.tensors:
        hf_name, tensor = hf_names.get(name, name), Tensor(file.shape(name), functools.partial(file.read, name))
        if name != gguf_rope.DIVISORS:
            tensors[hf_name] = (
                weight_mapping.half_split(tensor, c.head_dim)
                if hf_name.endswith(weight_mapping.ROTATED) and _architecture(c) == "llama"
                else tensor
            )
    return tensors


def _architecture(c: ConfigDict) -> str:
    return "qwen3" if c.qk_norm else "qwen2" if c.qkv_bias else "llama"


def _gguf_names(c: ConfigDict) -> dict[str, str]:
    """{Hugging Face name: GGUF name}"""
    table = gguf.get_tensor_name_map(ARCHITECTURES[_architecture(c)], c.n_layers)
    names = {
        name: table.get_name(name, (".weight", ".bias")) for shapes in weight_mapping.mapping(c).values() for name, _ in shapes
    }
    return {name: theirs for name, theirs in names.items() if theirs is not None}


def _read_tokenizer(file: GGUFFile) -> PreTrainedTokenizerFast | None:
    model, name = file.get("tokenizer.ggml.model"), file.get("tokenizer.ggml.pre")
    if model != "gpt2" or name not in PRE_TOKENIZERS:
        problem = f"model is {model!r} (expected 'gpt2', a byte-level BPE" if model != "gpt2" else f"pre is {name!r} ("
        print(
            f"warning: {file.path}: unsupported tokenizer, tokenizer.ggml.{problem}; give another with --tokenizer)",
            file=sys.stderr,
        )
        return None
    normalizer, pre_tokenizer, ignore_merges = PRE_TOKENIZERS[name]
    tokens = file.get("tokenizer.ggml.tokens", [])
    token_types = file.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    merges = [tuple(merge.split(" ")) for merge in file.get("tokenizer.ggml.merges", [])]
    try:
        vocabulary = {
            token: i for i, (token, its_type) in enumerate(zip(tokens, token_types, strict=True)) if its_type != UNUSED
        }
        bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges, ignore_merges=ignore_merges))
        ids = {key: file.get(f"tokenizer.ggml.{theirs}_token_id") for key, theirs in SPECIAL.items()}
        special = {f"{key}_token": tokens[i] for key, i in ids.items() if i is not None}
    except Exception as error:  # the library raises bare Exception for merges of unknown tokens
        raise UserError(f"{file.path}: cannot read the tokenizer ({error}; give another with --tokenizer)") from error
    if "eos_token" not in special:
        raise UserError(f"{file.path}: the tokenizer has no end token (give another with --tokenizer)")
    # If documents do not begin with <bos> (SmolLM2, Qwen3), the model has none. Some Llama 3 files omit the key.
    if not file.get("tokenizer.ggml.add_bos_token", name == "llama-bpe"):
        special.pop("bos_token", None)
    bpe.normalizer, bpe.pre_tokenizer, bpe.decoder = normalizer, pre_tokenizer, tokenizers.decoders.ByteLevel()
    added = {}
    for added_type in (CONTROL, USER_DEFINED):
        added[added_type] = [token for token, its_type in zip(tokens, token_types, strict=True) if its_type == added_type]
        bpe.add_tokens(
            [tokenizers.AddedToken(token, special=added_type == CONTROL, normalized=False) for token in added[added_type]]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        chat_template=file.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        extra_special_tokens=[token for token in added[CONTROL] if token not in special.values()],
        **special,
    )


# ---- writing ------------------------------------------------------------------------------------------------------


def write_gguf(path: Path, model: StoredModel, params: nnx.State, dtype: str) -> None:
    """Write a file, one array at a time.

    Args:
      params: float32.
      dtype: of matrices, a key of DTYPES.

    Raises:
      UserError: a mixture of experts; a pre-tokenizer or rope scaling that llama.cpp does not support; weights that overflow
        float16; row lengths that q8_0 does not allow.
    """
    c, tokenizer = model.config.model, model.tokenizer
    assert tokenizer is not None  # checked by `formats.convert`
    _check_writable(c)
    matrix_type, file_type = DTYPES[dtype]
    architecture = _architecture(c)
    writer = gguf.GGUFWriter(None, architecture)
    _add_sizes(writer, path.stem, c, file_type)
    _add_tokenizer(writer, tokenizer, c.vocab_size)
    further = all_end_ids(model)[1:]
    if len(further) > len(FURTHER_ENDS):
        print(f"warning: a .gguf file holds three end tokens; left out: {further[len(FURTHER_ENDS) :]}", file=sys.stderr)
    for name, token in zip(FURTHER_ENDS, further, strict=False):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)

    gguf_names = _gguf_names(c)
    tensors = {
        gguf_names[name]: weight_mapping.interleaved(tensor, c.head_dim)
        if name.endswith(weight_mapping.ROTATED) and architecture == "llama"
        else tensor
        for name, tensor in weight_mapping.to_hf(params, c).items()
    }
    if c.rope_factor != 1:
        tensors |= gguf_rope.add_scaling(writer, c)
    types = {name: matrix_type if len(tensor.shape) > 1 else Type.F32 for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        block_size = gguf.GGML_QUANT_SIZES[types[name]][0]
        if tensor.shape[-1] % block_size:
            raise UserError(
                f"--dtype: {dtype} needs rows of a multiple of {block_size} numbers; those of {name} have {tensor.shape[-1]}"
            )
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
                raise UserError("--dtype: some weights overflow float16 (expected bfloat16 or float32)")
            writer.write_tensor_data(array)
    finally:
        writer.close()


def _check_writable(c: ConfigDict) -> None:
    if c.use_moe:
        raise UserError("--to: cannot be a .gguf file with model.use_moe True (write a Hugging Face folder instead)")
    if c.qk_norm and c.qkv_bias:
        raise UserError("--to: cannot be a .gguf file with model.qk_norm True and model.qkv_bias True")
    if c.qkv_bias and c.head_dim != c.dim // c.n_heads:
        raise UserError(
            f"--to: cannot be a .gguf file with model.qkv_bias True and model.head_dim {c.head_dim} (llama.cpp's qwen2 has "
            f"only dim / n_heads, {c.dim // c.n_heads})"
        )
    gguf_rope.check_writable(c)


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
        raise UserError(f"--to: cannot be a .gguf file with this {bpe['type']} tokenizer (expected a byte-level BPE)")
    if not bpe["merges"]:
        raise UserError("--to: cannot be a .gguf file: the tokenizer has no merges, and llama.cpp requires some")
    splitting = _splitting(tokenizer.backend_tokenizer)
    known = {}
    for name, (normalizer, pre_tokenizer, ignore_merges) in PRE_TOKENIZERS.items():
        other = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=ignore_merges))
        other.normalizer, other.pre_tokenizer = normalizer, pre_tokenizer
        known[name] = _splitting(other)
    name = next((name for name in known if known[name] == splitting), None)
    if name is None:
        raise UserError(
            f"--to: cannot be a .gguf file: llama.cpp does not know this tokenizer's pre-tokenizer (expected that of "
            f"{', '.join(PRE_TOKENIZERS)}; it is {json.dumps(backend['pre_tokenizer'])[:200]})"
        )
    pieces = {i: token for token, i in tokenizer.get_vocab().items()}
    added_types = {i: CONTROL if token.special else USER_DEFINED for i, token in tokenizer.added_tokens_decoder.items()}
    ids = range(vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list([pieces.get(i, f"[PAD{i}]") for i in ids])  # the embedding may have more rows
    writer.add_token_types([added_types.get(i, NORMAL) if i in pieces else UNUSED for i in ids])
    writer.add_token_merges([" ".join(merge) for merge in bpe["merges"]])
    for key, theirs in SPECIAL.items():
        if (i := getattr(tokenizer, f"{key}_token_id")) is not None:
            writer.add_uint32(f"tokenizer.ggml.{theirs}_token_id", i)
    writer.add_add_bos_token(tokenizer.bos_token_id is not None)  # makes llama.cpp put it before prompts
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)


def _splitting(tokenizer: tokenizers.Tokenizer) -> tuple:
    """The parts of a tokenizer that determine how text is split before merging, for comparison."""

    def without_offsets(part):
        if isinstance(part, dict):
            return {name: without_offsets(value) for name, value in part.items() if name != "trim_offsets"}
        return [without_offsets(value) for value in part] if isinstance(part, list) else part

    backend = json.loads(tokenizer.to_str())
    return without_offsets(backend["normalizer"]), without_offsets(backend["pre_tokenizer"]), backend["model"]["ignore_merges"]
