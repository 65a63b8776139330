import json
import math
import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
import tokenizers
import torch
from flax import nnx
from transformers import PreTrainedTokenizerFast

from mateconv_jax import config as config_lib, evaluate, run_folder
from mateconv_jax.data.dataset import open_dataset
from mateconv_jax.data.tokenizer import bpe, tokenizer as tokenizer_lib
from mateconv_jax.data.tokenizer.token_bytes import bytes_per_token, target_bytes
from mateconv_jax.errors import UserError
from mateconv_jax.evaluation import held_out
from mateconv_jax.model.config import ModelConfig, ModelOptions
from mateconv_jax.model.transformer import abstract_model
from mateconv_jax.prepare import main as prepare, parse_args as prepare_args
from mateconv_jax.training import evaluator, loop
from tests import llama

DOCUMENTS = [
    "长江是中国最长的河流。",
    "I ❤ 🐼🐼 and 👨‍👩‍👧!",
    "</s> 2024 年，naïve 的 <s>user",
    "明明在公园里看到一只小猫。" * 7,
]
MATECONV = Path(__file__).parents[3] / "shared" / "tokenizers" / "mateconv"


@pytest.fixture(scope="module")
def run(dataset_folder, tmp_path_factory):
    """A run of 12 steps with EMA weights that lag far behind."""
    folder = tmp_path_factory.mktemp("run") / "out"
    config = config_lib.default_config()
    config.model.update(dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=400, max_seq_len=64))
    config.data.update(dict(train_data_path=str(dataset_folder), seq_len=32))
    config.training.update(dict(out_dir=str(folder), batch_size=8, max_steps=12, learning_rate=1e-2, min_lr=1e-3))
    config.training.update(dict(use_ema=True, ema_decay=0.9, ema_warmup=False, eval_iters=1))
    loop.train(config_lib.resolve(config))
    return folder


@pytest.fixture(scope="module")
def tokenizer(run):
    return tokenizer_lib.load(run / "tokenizer", "")


def loss_of_transformers(run, use_ema, rows):
    """Nats a token over all real targets of the rows."""
    graph, abstract_params = abstract_model(
        ModelConfig.make(config_lib.options(ModelOptions, run_folder.read_config(run, "").model), "float32")
    )
    params = run_folder.load_params(run_folder.find_checkpoint(run, "").path, abstract_params, use_ema)
    reference = llama.from_ours(nnx.merge(graph, params))
    all_rows = rows.read(np.arange(len(rows)))
    nats = tokens = 0
    for row, length in zip(all_rows["tokens"].astype(np.int64), all_rows["length"].tolist(), strict=True):
        ids = torch.tensor(row[None, :length])
        with torch.no_grad():
            logits = reference(ids[:, :-1]).logits[0]
        nats += torch.nn.functional.cross_entropy(logits.double(), ids[0, 1:], reduction="sum").item()
        tokens += length - 1
    return nats / tokens, tokens


def test_losses_equal_transformers_on_the_same_weights(run, dataset_folder):
    result = held_out.evaluate_run(run, [str(dataset_folder)])
    rows = open_dataset(dataset_folder, "", 32).rows("validation")
    # What makes this hard: a padded row, and a last batch that is not full.
    assert rows.read(np.array([len(rows) - 1]))["length"][0] < 33 and len(rows) > 8 and len(rows) % 8
    assert (result["rows"], result["seq_len"], result["split"], result["step"]) == (len(rows), 32, "validation", 12)
    for name, use_ema in (("raw", False), ("ema", True)):
        loss, tokens = loss_of_transformers(run, use_ema, rows)
        score = result["scores"][name]
        assert score["loss"] == pytest.approx(loss, rel=1e-5)
        assert score["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
        assert result["tokens"] == tokens
    assert result["scores"]["ema"]["loss"] > result["scores"]["raw"]["loss"] + 0.1


def test_raw_text_is_read_as_prepare_reads_it(run, dataset_folder, tmp_path, capsys):
    """The same documents in another column, another encoding, and a .txt file: the same loss."""
    other = "".join(json.dumps({"body": text}, ensure_ascii=False) + "\n" for text in DOCUMENTS)
    (tmp_path / "other.jsonl").write_text(other, encoding="gb18030")
    (tmp_path / "text.txt").write_text("\n\n".join(DOCUMENTS), encoding="utf-16-le")

    def loss(*arguments):
        evaluate.main(evaluate.parse_args(["--model_path", str(run), "--no-use_ema", "--json", "--data", *map(str, arguments)]))
        return json.loads(capsys.readouterr().out.splitlines()[-1])["scores"]["raw"]["loss"]

    expected = loss(tmp_path / "text.txt", "--encoding", "utf-16-le", "--txt_document", "blank_line")
    assert loss(tmp_path / "other.jsonl", "--encoding", "gb18030", "--text_key", "body") == expected
    with pytest.raises(UserError, match="^--encoding: '.*' is prepared already"):
        held_out.evaluate_run(run, [str(dataset_folder)], reading={"encoding": "gb18030"})


def test_bits_per_byte_of_raw_text_by_hand(run, tokenizer, tmp_path):
    # Enough of them to notice a validation split, and one that is there twice.
    documents = [*DOCUMENTS, *(f"第{i}个🐼" for i in range(300)), DOCUMENTS[0]]
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents) + "broken\n")
    result = held_out.evaluate_run(run, [str(path)], use_ema=False)
    stream = [token for text in documents for token in (1, *tokenizer_lib.encode(tokenizer, [text])[0], 2)]
    n_bytes = sum(len(text.encode()) for text in documents)
    assert (result["tokens"], result["bytes"]) == (len(stream) - 1, n_bytes)
    assert list(result["scores"]) == ["raw"] and result["split"] is None and result["rejected"] == {"invalid_json": 1}
    score = result["scores"]["raw"]
    assert score["bits_per_byte"] == pytest.approx(score["loss"] * (len(stream) - 1) / math.log(2) / n_bytes, rel=1e-9)

    # The loss of that stream, cut into rows by hand.
    np.array(stream, np.uint16).tofile(tmp_path / "text.bin")
    flat = open_dataset(tmp_path / "text.bin", "", 32).rows("")
    assert score["loss"] == pytest.approx(loss_of_transformers(run, False, flat)[0], rel=1e-5)
    of_bin = held_out.evaluate_run(run, [str(tmp_path / "text.bin")], use_ema=False)
    assert of_bin["scores"]["raw"] == pytest.approx(score, rel=1e-6) and of_bin["bytes"] == n_bytes


def test_several_files_are_one_text(run, tmp_path):
    for i, text in enumerate(DOCUMENTS):
        (tmp_path / f"{i}.txt").write_text(text + "\n", encoding="utf-8")
    files = [str(tmp_path / f"{i}.txt") for i in range(len(DOCUMENTS))]
    result = held_out.evaluate_run(run, files, use_ema=True)
    assert result["bytes"] == sum(len(text.encode()) for text in DOCUMENTS)
    assert result == held_out.evaluate_run(run, [str(tmp_path / "*.txt")], use_ema=True) | {"data": files}
    assert list(result["scores"]) == ["ema"]


def test_the_batch_size_changes_nothing_and_one_program_is_compiled(run, dataset_folder, monkeypatch):
    steps = []

    def make_eval_step(*args):
        steps.append(real(*args))
        return steps[-1]

    real = held_out.make_eval_step
    monkeypatch.setattr(held_out, "make_eval_step", make_eval_step)
    first = held_out.evaluate_run(run, [str(dataset_folder)], batch_size=5)
    second = held_out.evaluate_run(run, [str(dataset_folder)], batch_size=64)
    assert [step._cache_size() for step in steps] == [1, 1]
    for name in ("raw", "ema"):
        a, b = first["scores"][name], second["scores"][name]
        assert a == pytest.approx(b, rel=1e-6 * a["loss"])  # perplexity = exp(loss): its relative error is the loss's, times it
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
    assert first | {"scores": 0} == second | {"scores": 0}


def test_max_batches_reads_the_first_ones(run, dataset_folder):
    result = held_out.evaluate_run(run, [str(dataset_folder)], "train", batch_size=4, max_batches=3)
    assert (result["rows"], result["tokens"], result["split"]) == (12, 12 * 32, "train")


def test_the_device_is_never_more_than_a_few_batches_ahead(run, dataset_folder, monkeypatch):
    """Else data that do not fit into memory would pile up on it."""
    ahead, dispatched, read = [], [], []
    device_get = jax.device_get

    def make_eval_step(*args):
        step = real(*args)

        def counted(params, batch):
            dispatched.append(1)
            ahead.append(len(dispatched) - len(read))
            return step(params, batch)

        return counted

    real = held_out.make_eval_step
    monkeypatch.setattr(held_out, "make_eval_step", make_eval_step)
    monkeypatch.setattr(evaluator.jax, "device_get", lambda x: read.append(1) or device_get(x))
    held_out.evaluate_run(run, [str(dataset_folder)], "train", batch_size=2, max_batches=40, use_ema=False)
    assert len(dispatched) == len(read) == 40
    assert max(ahead) == evaluator.LAG + 1 and ahead[10:] == [evaluator.LAG + 1] * 30


def test_documents_see_only_themselves_where_they_did_in_training(run, dataset_folder, tmp_path):
    plain = held_out.evaluate_run(run, [str(dataset_folder)], use_ema=False)["scores"]["raw"]["loss"]
    masked = tmp_path / "out"
    masked.mkdir()
    for name in ("checkpoints", "tokenizer"):
        (masked / name).symlink_to(run / name)
    config = json.loads((run / "config.json").read_text())
    config["training"]["document_mask"] = True
    (masked / "config.json").write_text(json.dumps(config))
    loss = held_out.evaluate_run(masked, [str(dataset_folder)], use_ema=False)["scores"]["raw"]["loss"]
    assert abs(loss - plain) > 1e-6  # without the mask 0


def command(*arguments, devices=1):
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    arguments = [sys.executable, "-m", "mateconv_jax.evaluate", *map(str, arguments)]
    return subprocess.run(arguments, capture_output=True, text=True, env=env, timeout=120)


@pytest.mark.slow
def test_four_devices_give_the_numbers_of_one(run, dataset_folder):
    result = command(f"--model_path={run}", f"--data={dataset_folder}", "--json", devices=4)
    assert result.returncode == 0, result.stderr
    theirs, ours = json.loads(result.stdout), held_out.evaluate_run(run, [str(dataset_folder)])
    for name in ("raw", "ema"):
        assert theirs["scores"][name] == pytest.approx(ours["scores"][name], rel=2e-6)
    assert theirs | {"scores": 0} == ours | {"scores": 0}
    wrong = command(f"--model_path={run}", f"--data={dataset_folder}", "--batch_size=6", devices=4)
    assert wrong.returncode == 2 and "--batch_size: 6 is invalid (expected a multiple of 4" in wrong.stderr


def test_the_table(run, dataset_folder, capsys):
    evaluate.main(evaluate.parse_args([f"--model_path={run}", f"--data={dataset_folder}"]))
    output = capsys.readouterr().out
    result = held_out.evaluate_run(run, [str(dataset_folder)])
    assert f"{run}, step 12, on {dataset_folder}, validation\n" in output
    assert f"{result['tokens']:,} targets, {result['bytes']:,} bytes of text" in output
    rows = [line.split() for line in output.splitlines()]
    for name, score in result["scores"].items():
        assert [name, *(f"{figure:,.4f}" for figure in score.values())] in rows


def test_a_model_that_diverged_has_no_figures():
    def figures(nats, tokens, n_bytes):
        result = evaluator.Evaluation(1, tokens, n_bytes, {"raw": nats})
        return held_out._score(result.loss("raw"), result.bits_per_byte("raw"))

    assert figures(math.nan, 3, 3) == {"loss": None, "perplexity": None, "bits_per_byte": None}
    assert figures(3000.0, 3, 0) == {"loss": 1000.0, "perplexity": None, "bits_per_byte": None}
    assert figures(0.0, 0, 0) == {"loss": None, "perplexity": None, "bits_per_byte": None}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "one of the arguments --data --tasks --says --prompts --demo is required"),
        (["--demo", "--data=x"], "not allowed with argument"),
        (["--demo", "--split=train"], "--split: only allowed with argument --data"),
        (["--prompts=x"], "--reward: required with --prompts"),
        (["--demo", "--reward=a:b"], "--reward: only allowed with argument --prompts or --tasks"),
        (["--demo", "--max_new_tokens=3"], "--max_new_tokens: only allowed with argument --prompts or --tasks or --says"),
        (["--demo", "--model_path=b"], "--model_path: models are compared with --data or --tasks or --says"),
        (["--data=x", "--by=source", "--max_batches=3"], "--max_batches: not allowed where documents are scored one by one"),
        (["--tasks=x", "--output=x.html", "--csv=y.csv"], "--csv: not allowed where models are compared"),
        (["--demo", "--max_batches=3"], "--max_batches: only allowed with argument --data"),
    ],
)  # fmt: skip
def test_flags_that_do_not_fit(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        evaluate.parse_args(["--model_path=out", *arguments])
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_data_that_do_not_fit(run, dataset_folder, demo_jsonl, tmp_path):
    def fails(message, data, **arguments):
        with pytest.raises(UserError, match=message) as error:
            held_out.evaluate_run(arguments.pop("model_path", run), [str(path) for path in data], **arguments)
        assert "\n" not in str(error.value)

    fails("--model_path: no model at", [dataset_folder], model_path=tmp_path / "none")
    fails("--data: no file at 'none.jsonl'", ["none.jsonl"])
    fails("--data: no file at 'none.bin'", ["none.bin"])
    fails("--data: no dataset at", [tmp_path])
    fails("--data: no file in .* has a known suffix", [tmp_path, demo_jsonl])
    fails(r"--split: .* has no split 'test' \(available: train, validation\)", [dataset_folder], split="test")
    fails("--split: .* has no splits", [demo_jsonl], split="train")
    fails("--batch_size: 0 is invalid", [dataset_folder], batch_size=0)
    fails("--max_batches: 0 is invalid", [dataset_folder], max_batches=0)
    (tmp_path / "bad.jsonl").write_text("no JSON\n")
    fails(r"--data: .*bad\.jsonl' is mostly unusable: .* line 1: not JSON.*leave it out$", [tmp_path / "bad.jsonl"])
    np.array([1, 5, 400, 2], np.uint16).tofile(tmp_path / "bad.bin")
    fails(r"--data: .* has the token id 400 \(the model's tokenizer has 400\)", [tmp_path / "bad.bin"])
    arguments = ["--input", str(demo_jsonl), "--num_workers=1", "--output"]
    prepare(prepare_args([*arguments, str(tmp_path / "other"), "--train_tokenizer", "--vocab_size=300", "--seq_len=32"]))
    fails(
        r"--data: .* was not tokenised with the model's tokenizer \(give the raw text, or prepare it with --tokenizer .*out/tokenizer\)",
        [tmp_path / "other"],
    )
    prepare(prepare_args([*arguments, str(tmp_path / "long"), "--tokenizer", str(run / "tokenizer"), "--seq_len=65"]))
    fails("--data: .* has rows of 65 tokens, longer than the model's context of 64", [tmp_path / "long"])


def test_a_run_without_ema_has_raw_scores_only(run, dataset_folder, tiny_config):
    tiny_config.training.max_steps = 1
    loop.train(config_lib.resolve(tiny_config))
    result = held_out.evaluate_run(tiny_config.training.out_dir, [str(dataset_folder)])
    assert list(result["scores"]) == ["raw"]
    with pytest.raises(UserError, match="--use_ema: .* has no EMA weights"):
        held_out.evaluate_run(tiny_config.training.out_dir, [str(dataset_folder)], use_ema=True)


# ---- bytes of a token ---------------------------------------------------------------------------------------------


@hypothesis.given(st.text())
def test_a_texts_tokens_sum_to_its_bytes(tokenizer, text):
    n_bytes = bytes_per_token(tokenizer)
    assert n_bytes.shape == (400,) and n_bytes.dtype == np.int32
    assert n_bytes[tokenizer_lib.encode(tokenizer, [text])[0]].sum() == len(text.encode())


def test_control_tokens_write_nothing():
    tokenizer = bpe.train(["中国的首都是北京。"] * 3, 270, special_tokens=["<think>"])
    tokenizer.add_tokens(["é!"])
    n_bytes = bytes_per_token(tokenizer)
    assert n_bytes[:5].tolist() == [0] * 5 and (n_bytes[5:] > 0).all()
    assert n_bytes[tokenizer.convert_tokens_to_ids("é!")] == 3


def test_padding_and_the_first_token_of_a_row_are_no_targets():
    batch = {"tokens": np.array([[1, 2, 2], [1, 2, 0], [0, 0, 0]], np.uint16), "length": np.array([3, 2, 0], np.int32)}
    assert target_bytes(np.array([1000, 100, 1], np.int32), batch) == 3


@pytest.mark.skipif(not MATECONV.is_dir(), reason="PyTorch MateConv's tokenizer is not there")
def test_mateconvs_own_tokenizer():
    tokenizer = tokenizer_lib.load(MATECONV, "")
    n_bytes = bytes_per_token(tokenizer)
    assert n_bytes.shape == (6400,) and n_bytes[[0, 1, 2]].tolist() == [0, 0, 0]
    for text in DOCUMENTS:
        ids = tokenizer_lib.encode(tokenizer, [text])[0]
        assert n_bytes[ids].sum() == len(tokenizer.decode(ids).encode())


def test_a_vocabulary_of_words_with_byte_fallback():
    """As SentencePiece makes them: ▁ is a space, and what is no word is bytes."""
    vocabulary = {
        piece: i for i, piece in enumerate(["<unk>", "<s>", "</s>", "▁", "▁hi", "中", "国", "<0xE4>", "<0xBD>", "<0xA0>"])
    }
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    assert bytes_per_token(tokenizer).tolist() == [0, 0, 0, 1, 3, 3, 3, 1, 1, 1]
