import json
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from matplotlib.font_manager import get_font

from mateconv_jax import plotting
from mateconv_jax.data.build import statistics_plot
from mateconv_jax.data.build.statistics import SplitCounts, Statistics, characters_by_script, print_table, summary
from mateconv_jax.data.tokenizer import bpe, tokenizer as tokenizer_lib

TEXTS = ["长江是中国最长的河流。", "黄河在北方。", "长江，长江。", "𠀀 ok\n"]
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)


@pytest.fixture(scope="module")
def tokenizer():
    return bpe.train(TEXTS * 5, 300)


def add(statistics, split, documents):
    """Documents as (text, token ids); each a row of its own and 100 bytes."""
    texts = [text for text, _ in documents]
    lengths = [len(ids) for _, ids in documents]
    stream = np.array([token for _, ids in documents for token in ids], np.uint16)
    statistics.add_documents(split, texts, lengths, stream, rows(lengths), 100 * len(documents))


def rows(lengths, seq_len=49):
    """As many tokens as given in each."""
    return {"tokens": np.zeros((len(lengths), seq_len + 1), np.uint16), "length": np.array(lengths, np.int32)}


def encoded(tokenizer, texts):
    ids = tokenizer_lib.encode(tokenizer, texts)
    return [(text, [tokenizer.bos_token_id, *i, tokenizer.eos_token_id]) for text, i in zip(texts, ids, strict=True)]


def of_texts(tokenizer, texts):
    statistics = Statistics(len(tokenizer), lines=len(texts), bytes_in=sum(len(text.encode()) for text in texts))
    add(statistics, "train", encoded(tokenizer, texts))
    return statistics


def state(statistics):
    return vars(statistics) | {"token_counts": statistics.token_counts.tolist()}


# ---- sums ---------------------------------------------------------------------------------------------------------

VOCAB = 20
COUNTERS = ("schemas", "ignored_fields", "rejects", "cleaned")
DOCUMENT = st.tuples(st.text(alphabet=st.characters()), st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40))
CHUNK = st.fixed_dictionaries(
    {
        "train": st.lists(DOCUMENT, max_size=4),
        "validation": st.lists(DOCUMENT, max_size=2),
        **{counter: st.dictionaries(st.text(), st.integers(1, 9), max_size=3) for counter in COUNTERS},
    }
)


def of_chunk(chunk):
    statistics = Statistics(VOCAB, lines=7, bytes_in=1000)
    for counter in COUNTERS:
        getattr(statistics, counter).update(chunk[counter])
    for split in ("train", "validation"):
        if chunk[split]:
            add(statistics, split, chunk[split])
    return statistics


@given(st.lists(CHUNK, min_size=1, max_size=4))
def test_merged_chunks_equal_one_pass(chunks):
    merged = Statistics(VOCAB)
    for chunk in reversed(chunks):
        merged += of_chunk(chunk)

    whole = Statistics(VOCAB, lines=7 * len(chunks), bytes_in=1000 * len(chunks))
    for key in COUNTERS:
        for chunk in chunks:
            getattr(whole, key).update(chunk[key])
    for split in ("train", "validation"):
        documents = [document for chunk in chunks for document in chunk[split]]
        if documents:
            add(whole, split, documents)
    assert state(merged) == state(whole)


@given(st.lists(DOCUMENT, min_size=1))
def test_counts_are_those_of_a_plain_loop(documents):
    statistics = Statistics(VOCAB)
    add(statistics, "train", documents)
    tokens = Counter(token for _, ids in documents for token in ids)
    characters = Counter(ord(character) for text, _ in documents for character in text)
    n = len(documents)
    assert statistics.splits == {
        "train": SplitCounts(n, characters.total(), tokens.total(), n, 100 * n, tokens.total(), tokens.total() - n)
    }
    assert statistics.code_points == characters
    assert statistics.document_lengths == Counter(len(ids) for _, ids in documents)
    assert {token: count for token, count in enumerate(statistics.token_counts.tolist()) if count} == tokens


@given(CHUNK)
@settings(max_examples=25)
def test_a_saved_chunk_comes_back_equal(tmp_path_factory, chunk):
    path = tmp_path_factory.mktemp("chunk") / "00000.statistics"
    statistics = of_chunk(chunk)
    statistics.save(path)
    assert state(Statistics.load(path)) == state(statistics)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_token_outside_the_vocabulary_is_an_error():
    with pytest.raises(ValueError):
        add(Statistics(VOCAB), "train", [("a", [VOCAB])])


def test_workers_import_nothing_heavy():
    heavy = "{'jax', 'matplotlib', 'rich', 'tensorflow', 'tensorflow_datasets', 'transformers'}"
    program = f"import sys, mateconv_jax.data.build.statistics; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "set()\n"


# ---- figures ------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=150))
def test_document_lengths_equal_numpys_of_the_whole_list(tokenizer, lengths):
    statistics = Statistics(len(tokenizer))
    statistics.add_documents("train", [], lengths, np.zeros(sum(lengths), np.uint16), rows(lengths), 1)
    figures = summary(statistics, tokenizer, 49, 0)
    assert figures["document_length"] == {
        "mean": round(np.mean(lengths), 3),
        "min": min(lengths),
        **{f"p{percent}": np.percentile(lengths, percent, method="inverted_cdf") for percent in PERCENTILES},
        "max": max(lengths),
    }
    edges, counts = figures["length_histogram"].values()
    assert counts == np.histogram(lengths, edges)[0].tolist() and sum(counts) == len(lengths)
    assert counts[0] and counts[-1] and edges == sorted(set(edges))


def test_characters_belong_to_their_script():
    groups = {
        "han": "汉字〇々豈⼀" + "\U00020000\U0002f800\U00030000\U00031350",  # with compatibility, extensions B, G and H
        "latin": "azÉＡｚ",
        "digits": "09１①Ⅷ",
        "punctuation": "，。！“”（）.,-_・",
        "whitespace": " \n\t\u3000\u00a0",
        "kana": "ひらカタｶー",
        "hangul": "한글",
        "bopomofo": "ㄅㄆ",
        "greek": "αΩ",
        "cyrillic": "Жя",
        "symbols": "+$￥→😀",
        "other": "ע\u200b\x00\ue000\ud800",
    }
    counts = Counter({ord(character): 3 for characters in groups.values() for character in characters})
    assert characters_by_script(counts) == {script: 3 * len(characters) for script, characters in groups.items()}


def test_top_tokens_can_be_read(tokenizer):
    parts = tokenizer_lib.encode(tokenizer, ["龘"])[0]  # not in the training text: its three bytes
    common = tokenizer_lib.encode(tokenizer, ["长江"])[0]
    assert (len(parts), len(common)) == (3, 1)
    statistics = Statistics(len(tokenizer))
    add(statistics, "train", [("", [1, *common * 5, *parts[:1] * 3, *parts[1:2] * 2, 2, 2, 2, 2])])
    top = summary(statistics, tokenizer, 49, 0)["top_tokens"]
    assert [(token["text"], token["count"], token["control"]) for token in top] == [
        ("长江", 5, False), ("</s>", 4, True), (r"\xe9", 3, False), (r"\xbe", 2, False), ("<s>", 1, True),
    ]  # fmt: skip
    assert [token["share"] for token in top] == [round(n / 15, 6) for n in (5, 4, 3, 2, 1)]
    assert top[0]["id"] == common[0]


def test_rates(tokenizer):
    statistics = Statistics(len(tokenizer))
    add(statistics, "train", [("长a", [0, 7, 8, 9]), ("𠀀", [0, 7, 7, 7, 7, 10])])
    statistics.rejects.update(duplicate=3, near_duplicate=2, too_short=9)
    figures = summary(statistics, tokenizer, 49, 1.5)
    assert figures["unknown_token_rate"] == 0.2
    assert (figures["characters_per_token"], figures["bytes_per_token"]) == (0.3, 0.8)
    assert figures["vocabulary"] == {"size": len(tokenizer), "used": 5, "used_share": round(5 / len(tokenizer), 6)}
    assert figures["token_ranks"] == {"rank": [1, 2, 3, 4, 5], "count": [5, 2, 1, 1, 1]}
    assert figures["duplicates"] == {"exact": 3, "near": 2}
    assert list(figures["rejects"]) == ["too_short", "duplicate", "near_duplicate"]


def test_figures_do_not_depend_on_the_order_of_chunks(tokenizer):
    def in_order(*splits):
        merged = Statistics(len(tokenizer))
        for split, text in splits:
            part = Statistics(len(tokenizer))
            part.rejects.update({split: 1})
            add(part, split, encoded(tokenizer, [text]))
            merged += part
        return json.dumps(summary(merged, tokenizer, 49, 0))

    splits = [("train", TEXTS[0]), ("validation", TEXTS[1])]
    assert in_order(*splits) == in_order(*reversed(splits))


def test_of_tokens_alone_the_characters_are_not_known(tokenizer):
    statistics = Statistics(len(tokenizer))
    statistics.add_documents("train", [], [3], np.array([1, 9, 2], np.uint16), rows([3]), 1)
    figures = summary(statistics, tokenizer, 49, 0)
    assert (figures["characters"], figures["characters_per_token"], figures["bytes_per_token"]) == (0, None, None)


# ---- shown --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shown(tokenizer):
    """Summaries of several sizes; the first with rules that are hard to show."""
    many = of_texts(tokenizer, TEXTS * 9 + ["长江" * n for n in range(1, 40)])
    many.rejects.update(
        {"too_short": 12_345, r"$\frac$ [red]": 5, "\x07𫇛": 3, "long" * 20: 2, **dict.fromkeys("abcdefghijklmn", 1)}
    )
    many.cleaned["unicode"] = 4
    tokens = Statistics(len(tokenizer))
    tokens.add_documents("train", [], [3], np.array([1, 9, 2], np.uint16), rows([3]), 1)
    kinds = {"many": many, "one": of_texts(tokenizer, TEXTS[:1]), "tokens": tokens, "none": Statistics(len(tokenizer))}
    return {kind: summary(statistics, tokenizer, 49, 2.5) for kind, statistics in kinds.items()}


@pytest.mark.parametrize("kind", ["many", "one", "tokens", "none"])
def test_the_plot_is_drawn_without_warnings_and_again_with_equal_bytes(shown, tmp_path, kind):
    settings_before = dict(matplotlib.rcParams)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a missing glyph is one
        statistics_plot.write_plot(shown[kind], tmp_path / "stats.png")
        statistics_plot.write_plot(json.loads(json.dumps(shown[kind])), tmp_path / "again.png")
    image = (tmp_path / "stats.png").read_bytes()
    assert image.startswith(b"\x89PNG") and image == (tmp_path / "again.png").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["again.png", "stats.png"]
    assert dict(matplotlib.rcParams) == settings_before


def test_the_font_has_every_character_of_the_labels():
    font = get_font(plotting.font().get_file())
    characters = {c for c in Path(statistics_plot.__file__).read_text(encoding="utf-8") if c.isprintable()}
    assert {"文", "档"} < characters
    assert [c for c in characters if not font.get_char_index(ord(c))] == []


@pytest.mark.parametrize("kind", ["many", "one", "tokens", "none"])
@pytest.mark.parametrize("columns", [80, 140])
def test_the_table_fits_the_page(shown, monkeypatch, capsys, columns, kind):
    monkeypatch.setenv("COLUMNS", str(columns))
    print_table(shown[kind], "data/[zh]")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "data/[zh]"
    assert max(map(len, lines)) <= columns and not any("\x1b" in line for line in lines)


def test_the_table_shows_the_main_figures(shown, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    print_table(shown["many"], "data/zh")
    rows = {name: figures for name, *figures in (line.split() for line in capsys.readouterr().out.splitlines() if line.strip())}
    assert rows["documents"] == ["75", "75"]
    assert rows["rejected"][:3] == ["too_short", "12,345", "(16460.00%),"]
    assert rows["cleaned"] == ["unicode", "4"]
    assert "[red]" in " ".join(rows["rejected"])
