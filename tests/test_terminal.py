import json
import sys

import pytest
from absl import logging as absl_logging

from mateconv_jax.errors import UserError, exit_code
from mateconv_jax.terminal import escaped_json, visible
from mateconv_jax.training.logging_setup import logging_to

WRITTEN = "熊猫\x1b]0;owned\x07\tand\r\x9b2J\n\x7f"


def test_a_terminal_gets_control_characters_as_escapes(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert visible(WRITTEN) == "熊猫\\x1b]0;owned\\x07\tand\\x0d\\x9b2J\n\\x7f"


@pytest.mark.parametrize("text", [WRITTEN, "长江\n\t"])
def test_a_file_gets_what_the_model_wrote(text, capsys):
    assert visible(text) == text


def test_json_says_the_same_without_them():
    line = escaped_json(json.dumps({"text": WRITTEN}, ensure_ascii=False))
    assert json.loads(line) == {"text": WRITTEN} and not set("\x1b\x07\r\x9b\x7f") & set(line)


def test_errors_and_logs_quote_nothing_that_moves_the_cursor(tmp_path, capsys):
    def fail():
        raise UserError(f"line 3: {WRITTEN}")

    assert exit_code(fail) == 2
    with logging_to(tmp_path / "train.log"):
        absl_logging.warning("sample: %s", WRITTEN)
    for shown in (capsys.readouterr().err, (tmp_path / "train.log").read_text(encoding="utf-8")):
        assert "owned" in shown and not set("\x1b\x07\r\x9b\x7f") & set(shown)
