"""Nothing that is done to a text takes time that grows with more than its length, whatever the text is."""

import random
import time
import unicodedata

import pytest

from mateconv_jax.data.text import duplicates
from mateconv_jax.data.text.cleaning import Cleaner, CleaningOptions, control_token_pattern
from mateconv_jax.data.text.jsonl import Rejected
from mateconv_jax.data.text.lines import lines
from mateconv_jax.data.tokenizer import bpe

PATHOLOGICAL = {
    "spaces": lambda n: "a" + " " * n + "b\r",
    "spaces and line feeds": lambda n: " \n" * (n // 2) + "x",
    "line feeds": lambda n: "x" + "\n" * n + "x",
    "carriage returns": lambda n: "\r" * n + "x",
    "punctuation": lambda n: "。" * n,
    "quotes": lambda n: "。" + "”" * n,
    "full stops": lambda n: ". " * (n // 2),
    "one character": lambda n: "啊" * n,
    "one word": lambda n: "abcdefghij" * (n // 10),
    "kana": lambda n: "あいうえおかきくけこ" * (n // 10),
    "base64": lambda n: "QUJDREVGabc123+/" * (n // 16),
    "emoji": lambda n: "😀😁😂🤣" * (n // 4),
    "control tokens": lambda n: "<s>user" * (n // 7),
    "brackets": lambda n: "<" * n,
    "marks in the wrong order": lambda n: "a" + "\u0301\u0316" * (n // 2),
    "marks in two wrong halves": lambda n: "a" + "\u0301" * (n // 2) + "\u0316" * (n // 2),
    "marks that decompose": lambda n: "a" + "\u0344\u0f73\u0316" * (n // 3),
    "hangul": lambda n: "\u1100\u1161\u11a8" * (n // 3),
}


def clean(text):
    options = CleaningOptions(unicode="nfkc", strip_control_tokens=True, max_repetition=1.0, min_han_ratio=0.0, max_chars=512)
    cleaner = Cleaner(options, control_token_pattern(["<s>", "</s>"]))
    try:
        document, _ = cleaner.clean(text)
    except Rejected:  # nothing may be left
        return
    cleaner.pieces(document)
    duplicates.band_keys(document, 0.8)


def train(text):
    bpe.train([text], 400)


def read(text):
    data = text.encode()
    for _ in lines((data[i : i + 64] for i in range(0, len(data), 64)), 1 << 30):
        pass


def seconds(function, text):
    start = time.process_time()
    function(text)
    return time.process_time() - start


@pytest.mark.parametrize("name", PATHOLOGICAL)
@pytest.mark.parametrize("function, n", [(clean, 40_000), (train, 20_000), (read, 400_000)])
def test_twice_the_text_takes_at_most_two_and_a_half_times_as_long(function, n, name):
    """What takes less than 50 ms for 4 n is not compared: 40,000 spaces took 30 s, 20,000 emoji 19 s.

    The shortest of up to 20 times each, taken in turns: a core that others share halves its speed for seconds.
    """
    long, short = PATHOLOGICAL[name](4 * n), PATHOLOGICAL[name](n)
    took_long = took_short = float("inf")
    for _ in range(20):
        took_long, took_short = min(took_long, seconds(function, long)), min(took_short, seconds(function, short))
        if took_long < 0.05 or took_long < 2.5**2 * took_short:
            return
    pytest.fail(f"{took_long:.3f} s for {len(long):,} characters, {took_short:.3f} s for {len(short):,}")


def test_marks_are_sorted_as_normalisation_sorts_them():
    rng = random.Random(0)
    marks = [chr(i) for i in range(0x300, 0x1E950) if unicodedata.combining(unicodedata.normalize("NFKD", chr(i))[0])]
    for form in ("nfc", "nfkc"):
        cleaner = Cleaner(CleaningOptions(unicode=form, whitespace="keep"), control_token_pattern([]))
        for _ in range(300):
            text = "a" + "".join(rng.choices(marks, k=rng.randrange(28, 90))) + "é가" + "".join(rng.choices(marks, k=40))
            assert cleaner.clean(text)[0] == unicodedata.normalize(form.upper(), text)
