import pytest

from mateconv_jax import intervals


@pytest.mark.parametrize(
    "value, expected",
    [(7, 7), ("7", 7), ("5%", 50), ("0.01%", 1), ("1epoch", 40), ("2 epochs", 80), ("0.5epoch", 20), ("12.5%", 125)],
)
def test_intervals(value, expected):
    assert intervals.steps(value, total_steps=1000, steps_per_epoch=40) == expected


@pytest.mark.parametrize("value", [0, -1, "0%", "x", "5 %%", "1.5", 1.5, "", None, "epoch", "1..5%"])
def test_what_is_not_an_interval(value):
    assert not intervals.is_interval(value)
