"""Several models on the same questions. What one answers: test_benchmark.py."""

import numpy as np
import pytest

from mateconv_jax.evaluation import benchmark_command, comparison
from mateconv_jax.reporting import compare_page


def result(path, right):
    """A model that answers these of six questions right, and writes one more answer that its function gave no reward."""
    records = [
        {
            "id": f"{i}", "subject": "law" if i < 4 else "<i>logic", "answer": 1, "truncated": False,
            "log_likelihoods": [-1.0, -0.5 - i], "acc": int(i in right), "acc_norm": 1,
        }
        for i in range(6)
    ]  # fmt: skip
    written = [
        {"id": "a", "subject": "", "text": "<script>", "truncated": False, "exact_match": reward} for reward in (1, None)
    ]
    tasks = [
        {"name": "exam", "questions": 6, "metrics": {"acc": {}, "acc_norm": {}}, "records": records},
        {"name": "sums", "questions": 2, "metrics": {"exact_match": {}}, "records": written},
    ]
    return {"model_path": path, "step": 3, "shots": 0, "score": "letters", "chat": True, "tasks": tasks}


def test_accuracies_are_compared_over_questions_and_subjects():
    results = [result("a", {0, 1, 4}), result("b", {0, 1, 2, 3})]
    compared = comparison.compare(results, benchmark_command.paired(results))
    rows = {(row["measure"], row["group"]): row for row in compared["rows"]}
    assert list(rows)[:4] == [("exam acc", ""), ("exam acc", "<i>logic"), ("exam acc", "law"), ("exam acc_norm", "")]
    assert [score["value"] for score in rows["exam acc", ""]["scores"]] == pytest.approx([0.5, 4 / 6])
    assert rows["exam acc", "law"]["differences"][0]["value"] == pytest.approx(0.5)
    assert rows["exam acc", "law"]["units"] == 4 and rows["sums exact_match", ""]["units"] == 1  # one got no reward
    alone = np.array([[1, 1, 0, 0], [1, 1, 1, 1]], float)
    assert rows["exam acc", "law"]["differences"] == comparison.bootstrap(alone, np.ones((2, 4)))["differences"]


def test_the_page_shows_what_is_answered_differently():
    results = [result("a", {0, 1, 4}), result("b", {0, 1, 2, 3})]
    [section] = benchmark_command.side_by_side(results)
    assert section["note"] == "3 of 6 questions" and [item["turns"][0][1] for item in section["items"]] == [
        "question 2", "question 3", "question 4"
    ]  # fmt: skip
    assert section["items"][0]["cells"] == [
        [{"text": "-1.00  -2.50", "note": "acc 0"}],
        [{"text": "-1.00  -2.50", "note": "acc 1"}],
    ]
    compared = comparison.compare(results, benchmark_command.paired(results))
    page = compare_page.html(compared, [section], benchmark_command.described(results[0])[1:])
    assert "exam (6 questions), sums (2 questions)" in page and "&lt;i&gt;logic" in page
