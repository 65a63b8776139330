import json
import os
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, strategies as st
from rich.cells import cell_len
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mateconv_jax.data.tokenizer import bpe, tokenizer as tokenizer_lib
from mateconv_jax.data.tokenizer.pieces import BYTES, readable
from mateconv_jax.data.tokenizer.report import report
from mateconv_jax.data.tokenizer.report_tables import print_encoding, print_report, print_vocabulary
from mateconv_jax.data.tokenizer.samples import HARD_CASES, SAMPLES

SHARED = Path(os.environ.get("MATECONV_SHARED", Path(__file__).parents[4] / "shared")) / "tokenizers"
TEXTS = ["中国的首都是北京。中国人在北京。", "The 中国 of 1234 and 1234\n"] * 9


@pytest.fixture(scope="module")
def trained():
    return bpe.train(TEXTS, 330)


def other_kind(model, trainer, decoder, pre_tokenizer, normalizer=None):
    backend = tokenizers.Tokenizer(model)
    backend.decoder, backend.pre_tokenizer = decoder, pre_tokenizer
    if normalizer:
        backend.normalizer = normalizer
    special = ["<unk>", "<s>", "</s>"]
    backend.train_from_iterator(TEXTS, trainer(vocab_size=600, special_tokens=special, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def lowercasing():
    """Byte-level, but it has only the bytes of its texts."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return other_kind(models.BPE(), trainers.BpeTrainer, decoders.ByteLevel(), byte_level, normalizers.Lowercase())


@pytest.fixture(scope="module")
def metaspace():
    """As LLaMA's first tokenizers: ▁ for a space, and bytes for characters that have no token."""
    bytes_first = {f"<0x{byte:02X}>": byte + 3 for byte in range(256)}
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **bytes_first, "▁": 259, "a": 260, "▁a": 261, "中": 262, "国": 263, "中国": 264}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [("▁", "a"), ("中", "国")], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


# ---- readable -----------------------------------------------------------------------------------------------------


def test_a_byte_level_piece_reads_as_its_text(trained):
    piece = "ä¸ŃåĽ½"
    assert readable(trained, [trained.convert_tokens_to_ids(piece)]) == ["中国"]
    assert readable(trained, trained.convert_tokens_to_ids(["<s>", "Ċ", "Ġ1234", "æ", "¸"])) == [
        "<s>",
        "\n",
        " 1234",
        r"\xe6",
        r"\xb8",
    ]


def test_the_alphabet_is_that_of_the_library():
    assert BYTES.keys() == set(pre_tokenizers.ByteLevel.alphabet())
    for character, byte in BYTES.items():
        assert decoders.ByteLevel().decode([character]) == bytes([byte]).decode(errors="replace")


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\\")))
def test_the_pieces_of_a_text_together_are_the_text(trained, text):
    pieces = readable(trained, tokenizer_lib.encode(trained, [text])[0])
    spelt = bytes(int(byte, 16) for piece in pieces for byte in _hex(piece))
    assert spelt.decode() == text


def _hex(piece):
    """The bytes of a piece, escaped or not, as hexadecimal numbers."""
    while piece:
        if piece.startswith("\\x"):
            yield piece[2:4]
            piece = piece[4:]
        else:
            yield from (f"{byte:02x}" for byte in piece[0].encode())
            piece = piece[1:]


def test_a_tokenizer_that_is_not_byte_level_reads_as_it_decodes(metaspace):
    tokens = ["▁a", "a", "中国", "<0xE4>", "</s>"]
    assert readable(metaspace, metaspace.convert_tokens_to_ids(tokens)) == [" a", "a", "中国", "<0xE4>", "</s>"]


def test_a_control_token_reads_as_it_is_written():
    """Its characters are no bytes, though some of them are in the alphabet of bytes."""
    tokenizer = bpe.train(TEXTS, 300, special_tokens=["<é>", "【思考】"])
    assert readable(tokenizer, [4, 5]) == ["<é>", "【思考】"]


# ---- the report ---------------------------------------------------------------------------------------------------


def test_the_report_of_our_own_tokenizer(trained):
    made = report(trained)
    assert json.loads(json.dumps(made)) == made
    assert made["kind"] == "BPE, byte-level; pre-tokenizer ByteLevel"
    assert (made["vocab_size"], made["bytes"], made["chat_template"], made["longest_number"]) == (len(trained), 256, True, 4)
    assert made["special_tokens"][1] == {"id": 1, "text": "<s>", "roles": ["bos"], "special": True}
    assert made["round_trip"] == {"checked": len(SAMPLES) + len(HARD_CASES) + 1, "failed": []}
    assert made["read_from_text"] == []
    assert made["compare"] is None


def test_tokens_are_counted_by_kind(trained):
    made = report(trained)
    assert sum(made["tokens_by_kind"].values()) == len(trained)
    assert made["tokens_by_kind"]["control tokens"] == 4
    assert "中国" in made["examples"]["Han, 2 characters"]
    assert made["examples"]["digits"][:2] == ["0", "1"]
    assert made["tokens_by_kind"]["digits"] == sum(text.strip(" ").isdigit() for text in readable(trained, range(len(trained))))
    assert "The" in report(bpe.train(TEXTS, 400))["longest"]["other"]
    # 128 bytes are characters by themselves, the others only parts of one.
    assert report(bpe.train(["a"], 260))["tokens_by_kind"]["parts of a character"] == 128


def test_single_digits_are_seen():
    assert report(bpe.train(TEXTS, 330, split_digits=True))["longest_number"] == 1


def test_missing_bytes_are_seen(lowercasing, metaspace):
    assert report(lowercasing)["bytes"] < 100
    assert report(metaspace)["bytes"] == 256
    whole_words = other_kind(models.WordLevel(unk_token="<unk>"), trainers.WordLevelTrainer, None, pre_tokenizers.Whitespace())
    assert report(whole_words)["bytes"] is None


def test_compression_counts_what_the_tokenizer_does(trained):
    texts = ["中国的首都。", "龘"]
    counts = report(trained, {"mine": texts})["compression"]["mine"]
    ids = tokenizer_lib.encode(trained, texts)
    tokens = len(ids[0]) + len(ids[1])
    assert counts == {
        "characters": 7, "bytes": 21, "tokens": tokens, "unknown": 0, "characters_per_token": round(7 / tokens, 4),
        "bytes_per_token": round(21 / tokens, 4),
    }  # fmt: skip


def test_another_tokenizer_stands_beside_it(trained):
    bytes_only = bpe.train(TEXTS, 260)
    compared = report(trained, {"mine": TEXTS}, bytes_only)["compare"]
    assert (compared["vocab_size"], compared["shared_tokens"]) == (260, 260)
    assert compared["compression"] == report(bytes_only, {"mine": TEXTS})["compression"]
    assert compared["compression"]["mine"]["bytes_per_token"] == 1


def test_a_tokenizer_that_changes_texts_is_found_out(lowercasing):
    failed = report(lowercasing, {"mine": ["中国", "The 中国"]})["round_trip"]["failed"]
    assert {"name": "mine", "text": "The 中国", "decoded": "the 中国"} in failed
    assert {"English", "capitals"} <= {failure["name"] for failure in failed}
    assert not any(failure["name"] == "mine" and failure["text"] == "中国" for failure in failed)


def test_characters_that_are_lost_are_counted():
    tokenizer = other_kind(models.WordLevel(unk_token="<unk>"), trainers.WordLevelTrainer, None, pre_tokenizers.Whitespace())
    assert report(tokenizer, {"mine": ["The 龘 of"]})["compression"]["mine"]["unknown"] == 1


def test_control_tokens_that_a_text_can_write_are_found():
    tokenizer = bpe.train(TEXTS, 300)
    tokenizer.add_tokens(["<think>"])  # an ordinary token, as in MiniMind's tokenizer
    assert report(tokenizer)["read_from_text"] == ["<think>"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the tokenizers that users have are not here")
@pytest.mark.parametrize("name, control", [("mateconv", 3), ("minimind", 36)])
def test_tokenizers_that_users_have(name, control):
    made = report(tokenizer_lib.load(SHARED / name, ""))
    assert (made["vocab_size"], made["bytes"], made["tokens_by_kind"]["control tokens"]) == (6400, 256, control)
    assert made["round_trip"]["failed"] == []
    assert ("<think>" in made["read_from_text"]) == (name == "minimind")


# ---- on the terminal ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [80, 120])
def test_the_report_fits_the_terminal(trained, lowercasing, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    print_report(report(trained, {"data/a/long/path/to/raw.jsonl": TEXTS}, lowercasing), "tok/mine", "tok/theirs")
    print_report(report(lowercasing), "tok/theirs")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(cell_len, lines)) <= columns
    shown = "\n".join(lines)
    for expected in ("256 of 256", "1:<s>(bos)", "up to 4 in a token", "theirs", "raw.jsonl", "中国  北京", "all as they were"):
        assert expected in shown
    assert "came back changed" in shown and "The␣fe" in shown and "the␣fe" in shown
    assert f"{report(trained)['compression']['news']['characters_per_token']:.2f}" in shown
    ours, theirs = (report(one)["compression"]["English"]["tokens"] for one in (trained, lowercasing))
    (english,) = (line for line in lines if line.startswith("  English") and "%" in line)
    assert english.split()[-1] == f"{theirs / ours - 1:+.1%}"


def test_a_vocabulary_line_by_line(trained, capsys):
    print_vocabulary(trained)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(trained)
    assert lines[1] == "1\t<s>" and lines[trained.convert_tokens_to_ids("Ċ")].endswith(r"\n")
    print_vocabulary(trained, "中国", compare=trained)
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert len(lines) >= 2 and all("中国" in text and there == token for token, text, there in lines)
    print_vocabulary(trained, "中国", compare=bpe.train(["甲"], 260))
    assert capsys.readouterr().out.splitlines()[0].endswith("中国\t")


def test_the_pieces_of_a_text(trained, capsys):
    print_encoding(trained, "中国 1234</s>龘", "mine")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"mine: 12 characters in {len(lines) - 2} tokens, {12 / (len(lines) - 2):.2f} in each"
    assert lines[1].startswith("中国│␣1234│<│/│s│>│") and lines[1].endswith(r"\x98")
    assert lines[2] == f"{trained.convert_tokens_to_ids('ä¸ŃåĽ½')}\t中国"
    print_encoding(trained, "", "mine")
    assert capsys.readouterr().out == "mine: 0 characters in 0 tokens\n\n"
