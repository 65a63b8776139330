import math
import os
from pathlib import Path

import pytest

from mateconv_jax.errors import UserError
from mateconv_jax.evaluation import held_out, several_sets


@pytest.fixture
def sets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("wiki", "code"):
        (tmp_path / name).mkdir()
    (tmp_path / "a.jsonl").touch()


@several_sets.each
def score(model_path, data, batch_size=None):
    """The loss is the length of the path."""
    assert batch_size == 4
    loss = float(len(" ".join(data)))
    scores = {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": None if data == ["code"] else loss / 2}
    return {"model_path": model_path, "step": 3, "data": data, "tokens": 7, "scores": {"raw": scores}}


def test_the_mean_is_weighted(sets, capsys):
    result = score("out", ["wiki:3,a.jsonl:1"], batch_size=4)
    assert result["sets"]["wiki"]["scores"]["raw"]["loss"] == 4 and result["sets"]["a"]["weight"] == 0.25
    assert result["scores"]["raw"] == {"loss": 4.75, "perplexity": math.exp(4.75), "bits_per_byte": 2.375}
    held_out.print_result(result)
    words = capsys.readouterr().out.split()
    assert words[words.index("a") + 1 :][:4] == ["0.250", "raw", "7", "7.0000"] and words[words.index("mean") + 2] == "4.7500"


def test_several_datasets_weigh_the_same_and_several_files_are_one_text(sets):
    result = score("out", ["wiki", "code"], batch_size=4)
    assert [one["weight"] for one in result["sets"].values()] == [0.5, 0.5] and list(result["sets"]) == ["wiki", "code"]
    assert result["scores"]["raw"]["bits_per_byte"] is None
    assert result == score("out", ["wiki:1", "code:1"], batch_size=4) | {"data": ["wiki", "code"]}
    for folder in ("raw", "texts"):
        os.mkdir(folder)
        Path(folder, "a.jsonl").touch()
    assert "sets" not in score("out", ["raw", "texts"], batch_size=4)  # folders of raw files
    assert "sets" not in score("out", ["a.jsonl", "wiki"], batch_size=4) and "sets" not in score("out", ["wiki"], batch_size=4)
    with pytest.raises(UserError, match="--data: 'code' has no weight"):
        score("out", ["wiki:1", "code"], batch_size=4)
