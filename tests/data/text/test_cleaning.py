import unicodedata

import pytest
from hypothesis import given, strategies as st

from mateconv_jax.data.text import cleaning
from mateconv_jax.data.text.cleaning import Cleaner, CleaningOptions, control_token_pattern
from mateconv_jax.data.text.dialogue import Dialogue
from mateconv_jax.data.text.jsonl import Rejected
from mateconv_jax.errors import UserError

PATTERN = control_token_pattern(["<unk>", "<s>", "</s>", "<pad>"])


def clean(text, **options):
    return Cleaner(CleaningOptions(**options), PATTERN).clean(text)


def rule(text, **options):
    with pytest.raises(Rejected) as error:
        clean(text, **options)
    return error.value.rule


@pytest.mark.parametrize(
    "options, text, result, changed",
    [
        ({}, "cafe\u0301 ﬁ Ａ", "café ﬁ Ａ", {"unicode"}),
        ({"unicode": "nfkc"}, "cafe\u0301 ﬁ Ａ", "café fi A", {"unicode"}),
        ({"unicode": "keep"}, "cafe\u0301", "cafe\u0301", set()),
        ({}, "a\x00b\x1bc\ufeffd\te", "abcd\te", {"control_characters"}),
        ({"control_characters": "keep"}, "a\x00b", "a\x00b", set()),
        ({}, " 一 \r\n\r\n\n\n\u3000二\u3000\n三\r", "一\n\n\u3000二\n三", {"whitespace"}),
        ({"whitespace": "keep"}, " 一 \r\n", " 一 \r\n", set()),
        ({}, "<s>user\n你好</s>", "<s>user\n你好</s>", set()),
        ({"strip_control_tokens": True}, "<s>user\n你好</s>\n<s>assistant\n<pad>好</s><s>嗯", "你好\n好嗯", {"control_tokens"}),
        ({}, "春眠不觉晓", "春眠不觉晓", set()),
    ],
)
def test_what_is_mended(options, text, result, changed):
    assert clean(text, **options) == (result, changed)


@pytest.mark.parametrize(
    "options, text, expected",
    [
        ({}, "\x00\x01", "empty"),
        ({"strip_control_tokens": True}, "<s></s>", "empty"),
        ({"control_characters": "reject"}, "a\x07", "control_characters"),
        ({"min_chars": 3}, "二字", "too_short"),
        ({"max_chars": 3, "too_long": "drop"}, "四个字呢", "too_long"),
        ({"max_repetition": 0.3}, "哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈", "repetition"),
        ({"min_han_ratio": 0.5}, "mostly English 中文", "low_han_ratio"),
    ],
)
def test_what_is_rejected(options, text, expected):
    assert rule(text, **options) == expected
    if expected != "empty":
        clean(text)  # each of these rules is off by default


def test_what_passes_the_filters():
    clean("白日依山尽，黄河入海流。欲穷千里目，更上一层楼。", max_repetition=0.05, min_han_ratio=0.8, min_chars=24)


def test_a_dialogue_is_cleaned_turn_by_turn_and_never_split():
    turns = Dialogue([{"role": "user", "content": "你好\r\n"}, {"role": "assistant", "content": "好\x00"}])
    cleaner = Cleaner(CleaningOptions(max_chars=4), PATTERN)
    document, changed = cleaner.clean(turns)
    assert [turn["content"] for turn in document.messages] == ["你好", "好"] and changed == {"whitespace", "control_characters"}
    assert cleaner.pieces(document) == [document]
    with pytest.raises(Rejected, match="at most 3"):
        Cleaner(CleaningOptions(max_chars=3), PATTERN).clean(turns)


texts = st.text(st.sampled_from("春眠不觉晓，。！？”\n a.<s>/\x00\r\u3000\u0301e\ufeff"), max_size=80)


@given(texts, st.integers(1, 20))
def test_pieces_join_to_the_text_and_none_is_too_long(text, max_chars):
    pieces = cleaning.split_at_sentences(text, max_chars)
    assert "".join(pieces) == text
    assert all(len(piece) <= max_chars for piece in pieces)


def test_pieces_end_with_sentences_then_with_clauses():
    assert cleaning.split_at_sentences("他说：“走。”我说好。于是，我们都走了很远很远的路", 10) == [
        "他说：“走。”", "我说好。", "于是，", "我们都走了很远很远的", "路",
    ]  # fmt: skip


@given(texts)
def test_clean_text_is_normal_tidy_and_stays_as_it_is(text):
    try:
        cleaned, _ = clean(text)
    except Rejected:
        assert not unicodedata.normalize("NFC", text).translate(dict.fromkeys([0, 0xFEFF])).strip()
        return
    assert unicodedata.is_normalized("NFC", cleaned)
    assert not set(cleaned) & set("\x00\ufeff\r") and cleaned == cleaned.strip()
    assert "\n\n\n" not in cleaned and not any(line != line.rstrip() for line in cleaned.split("\n"))
    assert clean(cleaned) == (cleaned, set())


@pytest.mark.parametrize("text, share", [("", 0), ("一二三四五六七八九十", 0), ("一二三四五六七八九十" * 2, 1 / 11)])
def test_repetition(text, share):
    assert cleaning.repetition(text) == pytest.approx(share)


@pytest.mark.parametrize("text, ratio", [("中文 ab", 0.5), ("〇𠀀㐀", 1), ("，。", 0), ("", 0)])
def test_han_ratio(text, ratio):
    assert cleaning.han_ratio(text) == ratio


@pytest.mark.parametrize(
    "options",
    [{"unicode": "nfd"}, {"too_long": "cut"}, {"max_chars": 0}, {"min_chars": 5, "max_chars": 4}, {"min_han_ratio": 2}],
)
def test_impossible_options_are_errors(options):
    with pytest.raises(UserError, match=f"{[*options][-1]}: .*expected"):
        CleaningOptions(**options)
