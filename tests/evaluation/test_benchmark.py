"""evaluate --tasks. That the log-likelihoods are lm_eval's: test_lm_eval.py."""

import csv
import json
import math

import numpy as np
import pytest
from PIL import Image

from mateconv_jax import evaluate
from mateconv_jax.errors import UserError
from mateconv_jax.evaluation import benchmark, benchmark_table
from mateconv_jax.tasks import results
from mateconv_jax.tasks.benchmark import AskOptions
from mateconv_jax.tasks.files import read_tasks
from tests import llama
from tests.tasks import exams


@pytest.fixture(scope="module")
def model(dataset_folder, tmp_path_factory):
    """A Hugging Face folder whose context of 64 tokens all exams exceed: one shape."""
    return llama.hugging_face_folder(tmp_path_factory.mktemp("model") / "hf", dataset_folder, 64)


@pytest.fixture(scope="module")
def exam(tmp_path_factory):
    return exams.ceval(tmp_path_factory.mktemp("exam") / "ceval")


def main(model, *arguments):
    evaluate.main(evaluate.parse_args(["--model_path", str(model), *map(str, arguments)]))


def test_what_is_reported(model, exam, tmp_path, capsys):
    csv_path, plot = tmp_path / "tasks.csv", tmp_path / "plots" / "tasks.png"
    given = "--tasks", exam, "--shots", 2, "--csv", csv_path, "--plot", plot
    main(model, *given, "--json", "--records")
    result = json.loads(capsys.readouterr().out)
    assert (result["model_path"], result["shots"], result["score"], result["chat"]) == (str(model), 2, "letters", False)
    [task] = result["tasks"]
    assert (task["name"], task["kind"], task["questions"], task["truncated"], task["chance"]) == ("ceval", "choice", 7, 7, 0.25)
    right = [int(np.argmax(r["log_likelihoods"]) == r["answer"]) for r in task["records"]]
    assert [r["acc"] for r in task["records"]] == right and all(len(r["log_likelihoods"]) == 4 for r in task["records"])
    micro, (law, logic) = task["metrics"]["acc"], task["subjects"]
    assert micro["value"] == np.mean(right) and micro["stderr"] == pytest.approx(np.std(right, ddof=1) / math.sqrt(7))
    assert micro == task["metrics"]["acc_norm"] == task["metrics"]["acc_bytes"]  # letters have one length
    assert (law["subject"], law["title"], law["questions"], logic["questions"]) == ("law", "法学", 3, 4)
    assert law["metrics"]["acc"]["value"] == np.mean(right[:3])
    assert task["macro"]["acc"]["value"] == pytest.approx((np.mean(right[:3]) + np.mean(right[3:])) / 2)
    logged = results.means(read_tasks([str(exam)], "")[0], task["records"], ["acc"])  # by training
    assert logged == {"acc": micro["value"], "acc_macro": task["macro"]["acc"]["value"]}

    first = csv_path.read_text(encoding="utf-8-sig")
    rows = list(csv.DictReader(first.splitlines()))
    assert [row["subject"] for row in rows if row["metric"] == "acc"] == ["law", "logic", "(all, micro)", "(all, macro)"]
    assert float(rows[6]["value"]) == micro["value"] and float(rows[6]["high"]) == micro["interval"][1]
    assert Image.open(plot).info["Software"] == "mateconv_jax evaluate"
    main(model, *given, "--chat")  # the table; and our own files are replaced
    table = capsys.readouterr().out
    assert "2 shots, letters scored, chat template" in table and csv_path.read_text(encoding="utf-8-sig") != first
    assert "law 法学" in table and "all (macro)" in table and "not distinguishable from guessing (25.0%; p = " in table
    assert "7 of 7 prompts are longer than the model's context" in table and "acc_norm" not in table


def test_texts_clozes_continuations_and_answers(model, exam, tmp_path, capsys):
    exams.jsonl(tmp_path / "cloze.jsonl", [{"text": "他把____吃了。", "choices": ["苹果", "天空和大海"], "answer": 0}])
    exams.jsonl(
        tmp_path / "next.jsonl", [{"context": "明明在", "continuation": "公园"}, {"context": "I", "continuation": " am"}]
    )
    exams.jsonl(tmp_path / "sums.jsonl", [{"question": f"{i}+1=?", "answer": i + 1} for i in range(3)])
    paths = [f"{tmp_path / name}.jsonl" for name in ("cloze", "next", "sums")]
    result = benchmark.evaluate_tasks(model, [str(exam), *paths], AskOptions(score="texts"), max_new_tokens=4)
    texts, cloze, given, sums = result["tasks"]
    record = texts["records"][5]
    per_character = np.divide(record["log_likelihoods"], [1, 2, 2, 3])  # 9, 10, 12, 16个
    assert record["acc_norm"] == int(np.argmax(per_character) == record["answer"])
    [record] = cloze["records"]
    per_character, per_byte = (np.divide(record["log_likelihoods"], sizes) for sizes in ([5, 8], [15, 24]))
    assert cloze["chance"] == 0.5 and cloze["truncated"] == 0
    assert (record["acc_norm"], record["acc_bytes"]) == tuple(int(np.argmax(x) == 0) for x in (per_character, per_byte))
    mean = np.mean([record["log_likelihoods"][0] for record in given["records"]])
    assert (
        given["perplexity"] == pytest.approx(math.exp(-mean)) and given["chance"] is None and list(given["metrics"]) == ["acc"]
    )
    assert list(sums["metrics"]) == ["number_match"]
    assert sums["records"][0].keys() == {"id", "subject", "text", "truncated", "number_match"}
    assert all("\n\n" not in record["text"] for record in sums["records"])
    benchmark_table.print_table(result)
    assert "perplexity of the continuations" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--shots 6", "--shots: 6, but there are 5 examples of 'law'"),
        ("--shots -1", "--shots: -1 is invalid (expected at least 0)"),
        ("--limit 0", "--limit: 0 is invalid (expected at least 1)"),
        ("--batch_size 0", "--batch_size: 0 is invalid (expected at least 1)"),
        ("--plot a.jpg", "--plot: 'a.jpg' is invalid (expected a name that ends in .png)"),
        ("--csv {model}", "is invalid (expected a name that ends in .csv)"),
        ("--csv {csv}", "was not written by evaluate and is not replaced"),
    ],
)
def test_what_does_not_fit(arguments, message, model, exam, tmp_path):
    theirs = tmp_path / "theirs.csv"
    theirs.write_text("name,age\n")
    with pytest.raises(UserError) as error:
        main(model, "--tasks", exam, *arguments.format(model=model, csv=theirs).split())
    assert message in str(error.value) and theirs.read_text() == "name,age\n"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--data x --shots 1", "argument --shots: only allowed with argument --tasks"),
        ("--demo --batch_size 1", "argument --batch_size: only allowed with argument --data or --tasks"),
        ("--tasks x --data y", "not allowed with argument"),
    ],
)
def test_flags_that_do_not_fit(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        evaluate.parse_args(["--model_path", "x", *arguments.split()])
    assert exit.value.code == 2 and message in capsys.readouterr().err
