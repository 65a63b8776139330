"""Text in pieces: never half a character, never a part of a stop text, and joined the text of all tokens."""

import itertools

import pytest
from hypothesis import given, strategies as st

from mateconv_jax.data.tokenizer import tokenizer as tokenizer_lib
from mateconv_jax.inference.detokenizer import Detokenizer, continuation, decode
from tests import llama2_tokenizer

SPACED = llama2_tokenizer.make()


@pytest.fixture(scope="module")
def tokenizer(dataset_folder):
    return tokenizer_lib.load(dataset_folder / "tokenizer", "")


def pieces_of(tokenizer, ids, stop=()):
    text = Detokenizer(tokenizer, stop)
    return [*(text.push(token) for token in ids), text.finish()], text


def test_the_bytes_of_a_character_are_held_until_it_is_whole(tokenizer):
    ids = tokenizer_lib.encode(tokenizer, ["鑫，🐼"])[0]  # no tokens for these: 3 bytes and 4
    assert len(ids) == 8
    assert pieces_of(tokenizer, ids)[0] == ["", "", "鑫", "，", "", "", "", "🐼", ""]


def test_bytes_that_are_no_character_come_out_in_the_end(tokenizer):
    first, second, third = tokenizer_lib.encode(tokenizer, ["鑫"])[0]
    [a] = tokenizer_lib.encode(tokenizer, ["，"])[0]
    assert pieces_of(tokenizer, [second, a])[0] == ["", "\ufffd，", ""]
    assert "".join(pieces_of(tokenizer, [a, first, second])[0]) == decode(tokenizer, [a, first, second]) == "，\ufffd"


@given(ids=st.lists(st.integers(0, 399), max_size=40))
def test_the_pieces_joined_are_the_text_of_all_tokens(tokenizer, ids):
    pieces, text = pieces_of(tokenizer, ids)
    assert "".join(pieces) == decode(tokenizer, ids)
    assert text.n_tokens == len(ids) and not text.stopped


WORDS = st.text(alphabet="小明，鑫a", max_size=20)


@given(written=WORDS, stop=st.lists(st.text(alphabet="小明，鑫a", min_size=1, max_size=3), min_size=1, max_size=3))
def test_the_text_ends_before_the_stop_text_that_is_complete_first(tokenizer, written, stop):
    pieces, text = pieces_of(tokenizer, tokenizer_lib.encode(tokenizer, [written])[0], tuple(stop))
    ends = [(end, -len(s)) for s, end in itertools.product(stop, range(len(written) + 1)) if written[:end].endswith(s)]
    end, minus_length = min(ends, default=(len(written), 0))
    assert "".join(pieces) == written[: end + minus_length] and text.stopped == bool(ends)


def test_what_could_begin_a_stop_text_is_held(tokenizer):
    ids = tokenizer_lib.encode(tokenizer, ["鑫鑫，鑫鑫"])[0]
    pieces = pieces_of(tokenizer, ids, ("鑫，，",))[0]
    assert [piece for piece in pieces if piece] == ["鑫", "鑫，", "鑫", "鑫"]


def test_a_stop_text_may_be_a_control_token(tokenizer):
    [control] = [i for i, token in tokenizer.added_tokens_decoder.items() if token.content == "<s>"]
    ids = [*tokenizer_lib.encode(tokenizer, ["长江"])[0], control, *tokenizer_lib.encode(tokenizer, ["黄河"])[0]]
    pieces, text = pieces_of(tokenizer, ids, ("<s>",))
    assert "".join(pieces) == "长江" and text.stopped and text.n_tokens == ids.index(control)
    assert "".join(pieces_of(tokenizer, ids, ("</s>",))[0]) == "长江黄河"


# Without single bytes, of which a prompt and its answer could hold a half each.
@given(
    prompt=st.lists(st.integers(259, 399), min_size=1, max_size=5), ids=st.lists(st.integers(259, 399) | st.just(2), max_size=9)
)
def test_an_answer_keeps_the_space_between_a_prompt_and_itself(prompt, ids):
    text = Detokenizer(SPACED, before=prompt[-1:])
    pieces = [*(text.push(token) for token in ids), text.finish()]
    assert decode(SPACED, [1, *prompt]) + "".join(pieces) == decode(SPACED, [1, *prompt, *ids])
    assert continuation(SPACED, prompt[-1:], ids) == "".join(pieces)
    assert "".join(pieces_of(SPACED, ids)[0]) == decode(SPACED, ids)  # the answer to a question begins a text


@given(ids=st.lists(st.integers(0, 399), min_size=1, max_size=9))
def test_other_tokenizers_lose_nothing_and_get_nothing(tokenizer, ids):
    assert continuation(tokenizer, ids[:1], ids[1:]) == decode(tokenizer, ids[1:])


def test_a_character_made_of_bytes_keeps_the_space_before_it():
    prompt, ids = [SPACED(text)["input_ids"] for text in ("a", "中 中")]
    text = Detokenizer(SPACED, before=prompt)
    assert [*(text.push(token) for token in ids), text.finish()] == [" ", "", "", "中", " ", "", "", "中", ""]
    assert continuation(SPACED, prompt, ids) == " 中 中"
