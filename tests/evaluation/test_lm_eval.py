"""Against lm_eval: the same questions in local files, our weights exported."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import yaml

from mateconv_jax import convert
from mateconv_jax.evaluation import benchmark
from mateconv_jax.tasks.benchmark import AskOptions
from tests import llama
from tests.tasks import exams

# lm_eval's own tasks/ceval/_default_ceval_yaml, over local files.
EXAM = {
    "output_type": "multiple_choice",
    "validation_split": "val",
    "fewshot_split": "dev",
    "fewshot_config": {"sampler": "first_n"},
    "doc_to_text": "{{question.strip()}}\nA. {{A}}\nB. {{B}}\nC. {{C}}\nD. {{D}}\n答案：",
    "doc_to_choice": ["A", "B", "C", "D"],
    "doc_to_target": "{{['A', 'B', 'C', 'D'].index(answer)}}",
}
TEXTS = {
    "doc_to_text": "问题：{{question.strip()}}\n答案：",
    "doc_to_choice": "{{[A, B, C, D]}}",
    "target_delimiter": "",
}
METRICS = [{"metric": metric} for metric in ("acc", "acc_norm", "acc_bytes")]
LAW = "以下是中国关于法学的单项选择题，请选出其中的正确答案。\n\n"
LOGIC = "以下是中国关于逻辑学的单项选择题，请选出其中的正确答案。\n\n"
ARC = [
    {"id": "1", "question": "What is hot?", "choices": {"text": ["the fire", "ice"], "label": ["A", "B"]}, "answerKey": "A"},
    {"id": "2", "question": "What is cold?", "choices": {"text": ["fire", "a lot of ice", "sun"], "label": ["1", "2", "3"]}, "answerKey": "2"},
]  # fmt: skip
NEXT = [{"text": "明明 在 公园 里"}, {"text": "the cat sat on the mat"}, {"text": "一 二 三"}]

THEIRS = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager
folder, model, runs = json.loads(sys.argv[1])
manager = TaskManager(include_path=folder, include_defaults=False)
found = []
for tasks, n_shots, chat in runs:
    result = lm_eval.simple_evaluate(
        model="hf", model_args=f"pretrained={model},dtype=float32,add_bos_token=True", tasks=tasks, num_fewshot=n_shots, device="cpu",
        batch_size=4, task_manager=manager, log_samples=True, apply_chat_template=chat, fewshot_as_multiturn=chat, bootstrap_iters=0,
    )
    found.append({
        "samples": {
            task: [[[float(r[0]), bool(r[1])] for r in sample["filtered_resps"]] if isinstance(sample["filtered_resps"][0], (list, tuple))
            else [list(map(float, sample["filtered_resps"]))] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
            for task, samples in result["samples"].items()
        },
        "results": result["results"],
    })
print(json.dumps(found, default=str))
"""


@pytest.fixture(scope="module")
def model(dataset_folder, tmp_path_factory):
    """Weights that were a Hugging Face folder, then a run of ours, and were exported with `convert` in the end: (run, exported). The
    context of 320 tokens cuts prompts with examples.
    """
    folder = tmp_path_factory.mktemp("model")
    llama.from_ours(llama.peaked_model(320)).save_pretrained(folder / "hf")
    for file in (dataset_folder / "tokenizer").iterdir():
        (folder / "hf" / file.name).write_bytes(file.read_bytes())
    for source, target in (("hf", "run"), ("run", "exported")):
        flags = ["--from", str(folder / source), "--to", str(folder / target)]
        convert.main(convert.parse_args(flags))
    return folder / "run", folder / "exported"


def write_tasks(folder):
    """For lm_eval: law, logic, law_texts, arc and next, over the same questions as ours in JSONL."""
    names = ["question", "A", "B", "C", "D", "answer"]
    for subject, questions in (("law", exams.LAW), ("logic", exams.LOGIC)):
        for part, rows in (("val", questions), ("dev", exams.DEV)):
            exams.jsonl(folder / f"{subject}_{part}.jsonl", [dict(zip(names, row, strict=True)) for row in rows])

    def task(name, **fields):
        (folder / f"{name}.yaml").write_text(
            yaml.safe_dump({"task": name, "dataset_path": "json", **fields}, allow_unicode=True), encoding="utf-8"
        )

    for subject, description in (("law", LAW), ("logic", LOGIC)):
        files = {part: str(folder / f"{subject}_{part}.jsonl") for part in ("val", "dev")}
        task(subject, dataset_kwargs={"data_files": files}, description=description, metric_list=METRICS, **EXAM)
        task(f"{subject}_texts", dataset_kwargs={"data_files": files}, metric_list=METRICS, **EXAM | TEXTS)
    arc = dict(
        doc_to_text="Question: {{question}}\nAnswer:",
        doc_to_choice="{{choices.text}}",
        doc_to_target="{{choices.label.index(answerKey)}}",
    )
    files = {"test": str(exams.jsonl(folder / "arc.jsonl", ARC))}
    task(
        "arc",
        dataset_kwargs={"data_files": files},
        test_split="test",
        output_type="multiple_choice",
        metric_list=METRICS,
        **arc,
    )
    files = {"test": str(exams.jsonl(folder / "next.jsonl", NEXT))}
    lambada = dict(doc_to_text="{{text.split(' ')[:-1]|join(' ')}}", doc_to_target="{{' '+text.split(' ')[-1]}}")
    metrics = [{"metric": "acc"}, {"metric": "perplexity"}]
    task(
        "next",
        dataset_kwargs={"data_files": files},
        test_split="test",
        output_type="loglikelihood",
        metric_list=metrics,
        **lambada,
    )


@pytest.mark.slow
def test_log_likelihoods_and_accuracies_are_lm_evals(model, tmp_path):
    """Of every answer to 1e-4; of every question whether it is right. With and without examples, of which some prompts lose the first;
    through the chat template.
    """
    pytest.importorskip("lm_eval")
    run, exported = model
    write_tasks(tmp_path / "theirs")
    exam = exams.ceval(tmp_path / "ceval")
    runs = [
        (["law", "logic", "law_texts", "logic_texts", "arc", "next"], 0, False), (["law", "logic"], 5, False), (["law", "logic"], 2, True),
    ]  # fmt: skip
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    arguments = json.dumps([str(tmp_path / "theirs"), str(exported), runs])
    result = subprocess.run([sys.executable, "-c", THEIRS, arguments], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    zero, five, chat = json.loads(result.stdout.splitlines()[-1])

    def ours(path, **options):
        return benchmark.evaluate_tasks(run, [str(path)], AskOptions(**options), dtype="float32")["tasks"][0]

    found = ours(exam)
    assert found["truncated"] == 0
    compare(found, zero, {"law": "law", "logic": "logic"})
    found = ours(exam, n_shots=5)
    assert found["truncated"] > 0
    compare(found, five, {"law": "law", "logic": "logic"})
    compare(ours(exam, n_shots=2, chat=True), chat, {"law": "law", "logic": "logic"})
    compare(ours(exam, score="texts"), zero, {"law": "law_texts", "logic": "logic_texts"})
    compare(ours(tmp_path / "theirs" / "arc.jsonl", score="texts"), zero, {"": "arc"})
    found = ours(tmp_path / "theirs" / "next.jsonl")
    compare(found, zero, {"": "next"})
    assert found["perplexity"] == pytest.approx(zero["results"]["next"]["perplexity,none"], rel=1e-4)


def compare(found, theirs, names):
    """A task of ours with theirs. names: {subject: task}."""
    for subject, task in names.items():
        records = [record for record in found["records"] if record["subject"] == subject]
        for record, expected in zip(records, theirs["samples"][task], strict=True):
            np.testing.assert_allclose(record["log_likelihoods"], [each[0] for each in expected], atol=1e-4)
        figures = next(part for part in found["subjects"] if part["subject"] == subject)["metrics"]
        for metric, figure in figures.items():
            assert figure["value"] == theirs["results"][task][f"{metric},none"], (task, metric)
            error = theirs["results"][task].get(f"{metric}_stderr,none")
            assert error in ("N/A", pytest.approx(figure["stderr"])), (task, metric)
