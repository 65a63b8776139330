"""The line that a logged step gets: the numbers an eye follows, in columns."""

import math

from mateconv_jax.training.log_line import step_line


def test_a_step():
    scalars = {"train/loss": 0.7301, "lr": 1.07e-3, "grad_norm": 0.24, "tokens/s": 6_980.0, "step_time_s": 0.3875, "mfu": 0.4}
    assert step_line(340, 500, scalars) == "step 340/500  loss 0.7301  lr 1.07e-3  grad 0.24  7.0k tok/s  eta 1:02"


def test_the_first_step_has_no_speed_yet():
    line = step_line(1, 500, {"train/loss": math.log(6400), "lr": 0.0, "grad_norm": 12.345})
    assert line == "step   1/500  loss 8.7641  lr  0.00e0  grad 12.3"


def test_an_evaluation():
    scalars = {"val/loss": 2.5, "val/ema_loss": 2.25, "val/bits_per_byte": 1.2041}
    assert step_line(20, 20, scalars) == "step 20/20  val/loss 2.5000  ema 2.2500  1.204 bits/byte"


def test_an_evaluation_on_several_sets():
    scalars = {"val/loss": 2.5, "val/wiki/loss": 2.5, "val/wiki/bits_per_byte": 1.2, "val/code/loss": 10.25}
    assert step_line(20, 20, scalars) == "step 20/20  val/loss 2.5000  wiki 2.5000  code 10.250"


def test_columns_stay_where_they_are():
    lines = [
        step_line(step, 10_000, {"train/loss": loss, "lr": lr, "grad_norm": norm, "tokens/s": speed, "step_time_s": 1.0})
        for step, loss, lr, norm, speed in [
            (1, 10.4331, 0.0, 123.4, 12.0),
            (10, 9.9999, 3e-4, 9.996, 850.0),
            (9_999, 0.01, 1.07e-12, math.nan, 7_000.0),
            (10_000, math.inf, 1.0, 0.0, 70_400.0),
            (500, 217.28, 5e-5, 0.5, 1_234_567.0),
            (501, 3.0, 5e-5, 0.5, 999_600.0),
        ]
    ]
    # A learning rate below 1e-9 alone is wider.
    assert {line.replace("1.07e-12", "1.07e-9").index("tok/s") for line in lines} == {lines[0].index("tok/s")}
    assert lines[0].startswith("step     1/10000  loss 10.433  lr  0.00e0  grad  123    12 tok/s  eta 2:46:39")
    assert "1.2M tok/s" in lines[4] and "1.0M tok/s" in lines[5] and "grad  nan" in lines[2]
