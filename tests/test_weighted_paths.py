from fractions import Fraction

import pytest

from mateconv_jax import config as config_lib
from mateconv_jax.errors import UserError
from mateconv_jax.weighted_paths import as_text, parse


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")

    def make(*names):
        for name in names:
            (tmp_path / name).mkdir(parents=True)

    return make


@pytest.mark.parametrize(
    "text, expected",
    [
        ("data/zh", [("data/zh", 1)]),
        ("a:0.6,b:0.4", [("a", "0.6"), ("b", "0.4")]),
        ("a:3, b : 1e-1", [("a", 3), ("b", "0.1")]),
        ("~/a:1,b:.5", [("/home/me/a", 1), ("b", "0.5")]),
        ("C:/x:1,b,c:2", [("C:/x", 1), ("b,c", 2)]),
        ("data/zh:latest", [("data/zh:latest", 1)]),
        ("no/such,thing", [("no/such,thing", 1)]),
    ],
)
def test_what_text_means(folders, text, expected):
    assert parse(text, "key") == [(path, Fraction(weight)) for path, weight in expected]


def test_what_exists_decides(folders):
    folders("a:1", "x:1,b", "y:1,b:2")
    assert parse("a:1", "key") == [("a:1", 1)]
    assert parse("x:1,b:2", "key") == [("x:1,b", 2)]
    assert parse("y:1,b:2", "key") == [("y:1,b:2", 1)]
    assert parse("a:1:2,z:1", "key") == [("a:1", 2), ("z", 1)]


@pytest.mark.parametrize(
    "text, message",
    [
        ("a:1,b", "'b' has no weight"),
        ("a,b", "'a' has no weight"),
        ("a:1,b:0", "'b' has the weight 0 "),
        ("a:-1,b:1", "'a' has the weight -1 "),
        ("a:1,./a:2", "'./a' is there twice"),
    ],
)
def test_what_cannot_be_meant(folders, text, message):
    folders("a", "b")
    with pytest.raises(UserError, match=f"^key: {message}"):
        parse(text, "key")


@pytest.mark.parametrize(
    "value, text",
    [
        ("~/zh", "/home/me/zh"),
        ({"a.bin": 0.6, "~/b": 0.4}, "a.bin:0.6,/home/me/b:0.4"),
        (["a:3", "b:1"], "a:3,b:1"),
        ((("a", 1 / 3), ["b", 2]), f"a:{1 / 3},b:2"),
        (["a"], "a"),
        (2024, "2024"),
    ],
)
def test_what_a_config_file_may_say(folders, value, text):
    config = config_lib.default_config()
    config.data.train_data_path = value
    assert config_lib.resolve(config).data.train_data_path == text
    assert as_text(text, "key") == text  # as config.json has it


@pytest.mark.parametrize("value", [[], {}, [1, 2], [("a", 1, 2)]])
def test_what_a_config_file_may_not_say(value):
    with pytest.raises(UserError, match="^data.train_data_path: .*expected a path, or several with weights"):
        as_text(value, "data.train_data_path")


def test_a_dict_in_a_config_file(tmp_path, monkeypatch):
    """From the file to the resolved config: ConfigDict copies no dict with dots in its keys."""
    changes = "c.data.train_data_path = {'data/a.bin': 0.6, 'b': 0.4}"
    (tmp_path / "mine.py").write_text(
        f"from mateconv_jax.config import default_config\ndef get_config():\n    c = default_config()\n    {changes}\n    return c\n"
    )
    monkeypatch.setattr("sys.argv", ["train", f"--config={tmp_path}/mine.py", "--config.training.epochs=2"])
    config = config_lib.resolve(config_lib.from_command_line(["train", f"--config={tmp_path}/mine.py"]))
    assert config.data.train_data_path == "data/a.bin:0.6,b:0.4"
