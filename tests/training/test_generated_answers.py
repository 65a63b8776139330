import pytest

from mateconv_jax.tasks.files import read_tasks
from mateconv_jax.training.generated_answers import default_check
from tests.tasks import exams


@pytest.mark.parametrize(
    "answers, name",
    [
        ([2, "3.5", "-1,000"], "number_match"),
        (["First 2 + 2.\nThen 4.\n#### 4"], "number_match"),  # GSM8K
        (["4", "北京"], "exact_match"),
        (["2 个"], "exact_match"),
    ],
)
def test_what_checks_answers(answers, name, tmp_path):
    path = exams.jsonl(tmp_path / "a.jsonl", [{"question": "?", "answer": answer} for answer in answers])
    assert default_check(*read_tasks([str(path)], "")) == f"mateconv_jax.rewards:{name}"


def test_patterns(tmp_path):
    path = exams.jsonl(tmp_path / "a.jsonl", [{"prompt": "?", "pattern": "[0-9]+"}])
    assert default_check(*read_tasks([str(path)], "")) == "mateconv_jax.rewards:pattern_match"
