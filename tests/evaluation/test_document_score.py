"""Bits per byte of single documents: by field, beside reference points, and of several models."""

import json
import math
import shutil
import zlib

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from mateconv_jax import evaluate
from mateconv_jax.data.tokenizer import bpe, tokenizer as tokenizer_lib
from mateconv_jax.data.tokenizer.chat import encode_chat
from mateconv_jax.errors import UserError
from mateconv_jax.evaluation import document_score, documents, held_out, references
from mateconv_jax.evaluation.documents import Document
from tests import llama

TEXTS = [
    "长江是中国最长的河流。",
    "I ❤ 🐼🐼!",
    "</s> 2024 年，naïve 的 <s>user",
    "明明在公园里看到一只小猫。" * 7,
    "秋",
    "河流" * 40,
]
SOURCES = ["甲", "乙", "甲", "乙", "丙", "甲"]
S = 64  # the models' context


@pytest.fixture(scope="module")
def model(dataset_folder, tmp_path_factory):
    """A Hugging Face folder with random weights."""
    return llama.hugging_face_folder(tmp_path_factory.mktemp("model") / "hf", dataset_folder, S)


@pytest.fixture(scope="module")
def uniform(tmp_path_factory):
    """Another one, which finds all of its 300 tokens equally likely, with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("uniform") / "hf"
    model = llama.Transformer(llama.model_config(vocab_size=300, max_seq_len=S), nnx.Rngs(0))
    graph, params = nnx.split(model)
    llama.from_ours(nnx.merge(graph, jax.tree.map(np.zeros_like, params))).save_pretrained(folder)
    bpe.train(["长江是中国最长的河流。河流" * 3] * 3, 300).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "held_out.jsonl"
    lines = [{"text": text, "from": source} for text, source in zip(TEXTS, SOURCES, strict=True)]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def run(capsys, *arguments):
    evaluate.main(evaluate.parse_args([*map(str, arguments)]))
    return capsys.readouterr().out


def result_of(capsys, *arguments):
    return json.loads(run(capsys, *arguments, "--json").splitlines()[-1])


@pytest.fixture(scope="module")
def scored(model):
    return document_score.score(str(model), [Document(str(i), text) for i, text in enumerate(TEXTS)])


def bits_of_transformers(model, ids, n_scored):
    """Of the last n_scored tokens."""
    reference = llama.transformers.LlamaForCausalLM.from_pretrained(model).eval()
    with torch.no_grad():
        logits = reference(torch.tensor(ids[:-1])[None]).logits[0, -n_scored:].double()
    return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[-n_scored:]), reduction="sum").item() / math.log(2)


def test_bits_equal_transformers_on_windows_cut_by_hand(model, scored):
    tokenizer = tokenizer_lib.load(model, "")
    lengths = []
    for text, one in zip(TEXTS, scored["documents"], strict=True):
        ids = [1, *tokenizer_lib.encode(tokenizer, [text])[0], 2]
        lengths.append(len(ids))
        windows = [ids[start : start + S + 1] for start in range(0, len(ids) - 1, S)]
        bits = sum(bits_of_transformers(model, window, len(window) - 1) for window in windows)
        assert one["bits"] == pytest.approx(bits, rel=1e-5) and one["bytes"] == len(text.encode())
    assert max(lengths) > S and min(lengths) < 10  # several windows, and less than the shortest row


def test_order_and_batch_size_change_nothing_but_last_bits(model, scored):
    turned = [Document(str(i), TEXTS[i]) for i in (4, 2, 0, 5, 3, 1)]
    again = document_score.score(str(model), turned, batch_size=3)
    bits = {one["place"]: one["bits"] for one in scored["documents"]}
    assert {one["place"]: one["bits"] for one in again["documents"]} == pytest.approx(bits, rel=1e-5)


def test_few_programs_are_compiled():
    """However many lengths there are: rows of 64, 128, 256 and 500, the longest first, as many tokens in each."""
    encoded = [document_score.Encoded(np.zeros(n, int), np.ones(n, bool), n) for n in range(2, 1400, 7)]
    plan = list(document_score.plan_batches(encoded, 500, 8))
    assert [length for length in dict.fromkeys(length for _, length, _ in plan)] == [500, 256, 128, 64]
    assert {(length, rows) for _, length, rows in plan} == {(500, 8), (256, 8), (128, 24), (64, 56)}
    starts = {(document, start) for windows, _, _ in plan for document, start in windows}
    assert starts == {(i, start) for i, one in enumerate(encoded) for start in range(0, len(one.ids) - 1, 500)}


def test_a_document_alone_has_the_bits_per_byte_of_held_out(model, tmp_path):
    (tmp_path / "one.txt").write_text(TEXTS[0], encoding="utf-8")
    [one] = held_out.evaluate_run(model, [str(tmp_path / "one.txt")])["scores"].values()
    alone = document_score.score(str(model), [Document("", TEXTS[0])])["groups"][""]
    assert alone["bits_per_byte"] == pytest.approx(one["bits_per_byte"], rel=1e-6)


def test_any_tokenizer_is_counted_alike(uniform):
    """Each token and the end cost log2 of the vocabulary; the bytes are the text's, whatever the tokens."""
    tokenizer = tokenizer_lib.load(uniform, "")
    result = document_score.score(str(uniform), [Document("", text) for text in TEXTS])
    n_tokens = [len(ids) + 1 for ids in tokenizer_lib.encode(tokenizer, TEXTS)]
    assert [one["bits"] for one in result["documents"]] == pytest.approx([n * math.log2(300) for n in n_tokens], rel=1e-6)
    assert result["groups"][""]["bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert result["groups"][""]["tokens"] == sum(n_tokens)


def test_of_a_dialogue_only_answers_count(model, tmp_path, capsys):
    messages = [{"role": "user", "content": "你好吗？"}, {"role": "assistant", "content": "我很好。"}]
    (tmp_path / "d.jsonl").write_text(json.dumps({"messages": messages, "from": 3}) + "\n")
    result = result_of(capsys, "--model_path", model, "--data", tmp_path / "d.jsonl", "--by", "from")
    tokenizer = tokenizer_lib.load(model, "")
    prompt = encode_chat(tokenizer, messages[:1], add_generation_prompt=True)
    answer = [*tokenizer_lib.encode(tokenizer, ["我很好。"])[0], 2]
    bits = bits_of_transformers(model, prompt + answer, len(answer))
    [one] = result["documents"]
    assert (one["place"], one["group"], one["bytes"]) == (f"{tmp_path}/d.jsonl:1", "3", 12)
    assert one["bits"] == pytest.approx(bits, rel=1e-5)
    with pytest.raises(UserError, match="--reference: the data hold dialogues"):
        run(capsys, "--model_path", model, "--data", tmp_path / "d.jsonl", "--reference", tmp_path / "d.jsonl")


def test_groups_and_reference_points(model, jsonl, dataset_folder, capsys):
    arguments = ("--model_path", model, "--data", jsonl, "--by", "from", "--reference", dataset_folder)
    result = result_of(capsys, *arguments)
    assert {name: group["documents"] for name, group in result["groups"].items()} == {"": 6, "丙": 1, "乙": 2, "甲": 3}
    for name, group in result["groups"].items():
        of_group = [one for one in result["documents"] if name in ("", one["group"])]
        total = sum(one["bits"] for one in of_group) / sum(one["bytes"] for one in of_group)
        assert group["bits_per_byte"] == pytest.approx(total, rel=1e-9)
    found = result["references"]["bits_per_byte"]
    assert {name for name in found if set(found[name]) == set(result["groups"])} == {
        "byte unigram", "char unigram", "char 5-gram", "gzip", "xz"
    }  # fmt: skip
    assert list(found["xz after training text"]) == [""] and result["references"]["known"] == 0
    n_bytes = result["groups"]["乙"]["bytes"]
    joined = "".join(text + "\0" for text, source in zip(TEXTS, SOURCES, strict=True) if source == "乙").encode()
    assert len(zlib.decompress(zlib.compress(joined, 9, wbits=31), wbits=31)) == n_bytes + 2
    assert found["gzip"]["乙"] == 8 * len(zlib.compress(joined, 9, wbits=31)) / n_bytes
    assert 0 < found["char 5-gram"][""] < 20 and found["char 5-gram"]["丙"] > 0
    printed = run(capsys, *arguments)
    assert f"{result['groups']['甲']['bits_per_byte']:.3f}" in printed and f"{found['gzip']['乙']:.3f}" in printed
    assert f"{found['xz after training text']['']:.3f}" in printed and "丙" in printed  # no column is left out
    training = documents.read([str(dataset_folder)], "", "train", {})[0]
    assert result["references"]["documents"] == len(training)


def test_a_byte_unigram_by_hand():
    counts = np.ones(256)
    for byte in "甲a".encode() + b"\0" + b"a" + b"\0":
        counts[byte] += 1
    bits = [-sum(math.log2(counts[byte] / counts.sum()) for byte in text.encode() + b"\0") for text in ("a", "甲x", "")]
    assert references._byte_unigram(["甲a", "a"], ["a", "甲x", ""]) == pytest.approx(bits)


def test_training_text_that_was_seen_is_named(model, jsonl, capsys):
    printed = run(capsys, "--model_path", model, "--data", jsonl, "--reference", jsonl)
    assert "warning: 6 of the scored documents are in that training text" in printed


def test_a_dataset_folder_is_decoded_into_its_documents(dataset_folder, demo_jsonl, monkeypatch):
    """Every document of the corpus is in one of the splits, however the rows are read."""
    lines = [json.loads(line) for line in demo_jsonl.read_text(encoding="utf-8").splitlines()]
    texts = {line["text"] for line in lines if "text" in line}
    monkeypatch.setattr(documents, "BLOCK", 7)
    found = [
        document.content
        for split in ("train", "validation")
        for document in documents.read([str(dataset_folder)], "", split, {})[0]
    ]
    assert texts and texts <= set(found) and len(found) == len({json.dumps(line) for line in lines})
    monkeypatch.setattr(documents, "BLOCK", 40)
    some = documents.read([str(dataset_folder)], "", "train", {}, max_bytes=4_000)[0]
    assert 0 < len(some) < len(found) / 2 and {document.content for document in some} <= set(found)


def test_each_of_several_datasets_is_a_group(model, dataset_folder, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(dataset_folder, other)
    alone = result_of(capsys, "--model_path", model, "--data", dataset_folder, "--reference", dataset_folder)
    both = ("--model_path", model, "--model_path", model, "--data", dataset_folder, other)
    result = result_of(capsys, *both, "--split", "validation")
    groups, expected = result["models"][1]["groups"], alone["groups"][""]
    assert set(groups) == {"", str(dataset_folder), str(other)} and groups[str(other)] == expected
    assert (
        groups[""]["bits_per_byte"] == pytest.approx(expected["bits_per_byte"]) and groups[""]["bytes"] == 2 * expected["bytes"]
    )
    assert [row["group"] for row in result["comparison"]["rows"]] == ["", *sorted([str(dataset_folder), str(other)])]
    known = documents.read([str(dataset_folder), str(other)], "", "train", {}, max_bytes=8_000)[0]
    assert {document.group for document in known} == {str(dataset_folder), str(other)}


def test_of_a_large_text_evenly_spaced_pieces_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "CHUNK", 100)
    (tmp_path / "a.txt").write_text("".join(f"line {i:05d}\n" for i in range(1000)))
    read, _ = documents.read([str(tmp_path / "a.txt")], "", None, {}, max_bytes=1_200)
    numbers = [int(document.content[5:]) for document in read]
    assert 60 < len(numbers) <= 140 and numbers[0] == 0 and numbers[-1] > 850 and numbers == sorted(numbers)
    half, _ = documents.read([str(tmp_path / "a.txt")], "", None, {}, max_bytes=7_000)  # of 11,000: not its first 7,000
    assert 400 < len(half) < 600 and half[-1].content > "line 00950"


def test_several_models_are_compared(model, uniform, jsonl, tmp_path, capsys, monkeypatch):
    """With other tokenizers; one is freed before the next is read."""
    live = []
    real = document_score.open_to_score
    monkeypatch.setattr(
        document_score, "open_to_score", lambda *args: live.append(sum(x.nbytes for x in jax.live_arrays())) or real(*args)
    )
    page = tmp_path / "new" / "compare.html"
    both = ("--model_path", model, "--model_path", uniform, "--data", jsonl, "--by", "from", "--output", page)
    result = result_of(capsys, *both)
    assert live[1] - live[0] < 10_000  # the model has 100 kB
    alone = [document_score.score(str(path), [Document("", text) for text in TEXTS]) for path in (model, uniform)]
    row = result["comparison"]["rows"][0]
    for one, score in zip(alone, row["scores"], strict=True):
        assert score["value"] == pytest.approx(one["groups"][""]["bits_per_byte"], rel=1e-6)
    assert [row["group"] for row in result["comparison"]["rows"]] == ["", "丙", "乙", "甲"]
    html = page.read_text(encoding="utf-8")
    assert f"{row['scores'][1]['value']:.4f}" in html and "held_out.jsonl:4" in html and "乙" in html


def test_what_cannot_be_scored(model, jsonl, dataset_folder, tmp_path, capsys):
    def fails(message, *arguments):
        with pytest.raises(UserError, match=message) as error:
            run(capsys, "--model_path", model, *arguments)
        assert "\n" not in str(error.value)

    fails("--by: no document of .* has the field 'soruce'", "--data", jsonl, "--by", "soruce")
    fails("--by: .* is prepared already", "--data", dataset_folder, "--by", "from")
    fails("--data: .* has weights, which mean nothing", "--data", f"{dataset_folder}:1", "--reference", dataset_folder)
    fails("--split: .* has no splits", "--data", jsonl, "--by", "from", "--split", "train")
    fails("--split: .* has no split 'test'", "--data", dataset_folder, "--reference", jsonl, "--split", "test")
    fails("--reference: no file at 'none.jsonl'", "--data", jsonl, "--reference", "none.jsonl")
    np.array([1, 5, 2], np.uint16).tofile(tmp_path / "a.bin")
    fails("--data: .* holds token ids", "--data", tmp_path / "a.bin", "--reference", jsonl)
    (tmp_path / "bad.jsonl").write_text("no JSON\n")
    fails(r"--reference: .*bad\.jsonl' is mostly unusable", "--data", jsonl, "--reference", tmp_path / "bad.jsonl")
    (tmp_path / "page.html").write_text("mine")
    fails("--output: .* was not written by evaluate and is not replaced", "--data", jsonl, "--output", tmp_path / "page.html")
