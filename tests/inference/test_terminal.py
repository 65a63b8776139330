import sys

import pytest

from mateconv_jax.inference.terminal import visible

WRITTEN = "熊猫\x1b]0;owned\x07\tand\r\x9b2J\n\x7f"


def test_a_terminal_gets_control_characters_as_escapes(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert visible(WRITTEN) == "熊猫\\x1b]0;owned\\x07\tand\\x0d\\x9b2J\n\\x7f"


@pytest.mark.parametrize("text", [WRITTEN, "长江\n\t"])
def test_a_file_gets_what_the_model_wrote(text, capsys):
    assert visible(text) == text
