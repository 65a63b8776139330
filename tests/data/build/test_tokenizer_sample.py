from types import SimpleNamespace

import numpy as np

from mateconv_jax.data import dataset
from mateconv_jax.data.build import tokenizer_sample
from mateconv_jax.data.text.sources import Chunk, Part
from mateconv_jax.data.tokenizer import tokenizer as tokenizer_lib
from tests.data.build.preparing import prepare, write_jsonl


def test_tokenizer_options(tmp_path, dataset_folder):
    path = write_jsonl(tmp_path / "raw.jsonl", [{"text": f"一共有{i}只熊猫。"} for i in range(100, 400)])
    prepare(path, tmp_path / "given", "--tokenizer", dataset_folder / "tokenizer")
    fingerprints = [dataset.read_metadata(f, "")["tokenizer_fingerprint"] for f in (tmp_path / "given", dataset_folder)]
    assert fingerprints[0] == fingerprints[1]

    def vocabulary(name, *flags):
        return tokenizer_lib.load(prepare(path, tmp_path / name, "--train_tokenizer", *flags) / "tokenizer", "").get_vocab()

    assert len(vocabulary("small", "--vocab_size", "270")) == 270
    assert any(len(token) > 1 and token.isdigit() for token in vocabulary("merged", "--vocab_size", "400"))
    assert not any(
        len(token) > 1 and token.isdigit() for token in vocabulary("single", "--vocab_size", "400", "--split_digits")
    )
    assert vocabulary("sampled", "--vocab_size", "400", "--sample_mb", "0.0002") != vocabulary("all", "--vocab_size", "400")


def records(n, size=10):
    source = SimpleNamespace(path="a", format="jsonl")
    lines = [(i, b"%0*d" % (size, i)) for i in range(n)]
    return [Chunk(str(i), [Part(source, lines[i : i + 7])]) for i in range(0, n, 7)]


def drawn(chunks, max_bytes, seed=0):
    return [
        line for chunk in tokenizer_sample.sample(chunks, max_bytes, seed) for part in chunk.parts for line, _ in part.records
    ]


def test_a_sample_is_bounded_ordered_and_the_same_for_the_same_seed():
    sample = drawn(records(1000), 300)
    assert len(sample) == 30 and sample == sorted(sample)
    assert sample == drawn(records(1000), 300) != drawn(records(1000), 300, seed=1)
    assert drawn(records(20), 200) == list(range(20))
    long = Chunk("x", [Part(SimpleNamespace(path="a", format="jsonl"), [(1, b"x" * 301)])])
    assert len(drawn([long, *records(1000)], 300, seed=5)) == 30  # a record that is too long alone takes no place


def test_every_record_is_as_likely_in_a_sample():
    counts = np.zeros(50)
    for seed in range(2000):
        counts[drawn(records(50), 100, seed)] += 1
    assert counts.sum() == 2000 * 10
    chi_square = ((counts - 400) ** 2 / 400 / 0.8).sum()
    assert chi_square < 85  # 49 degrees of freedom: 0.1 % of fair samplers are above
