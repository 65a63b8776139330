"""Measurements in a file, and the times expected from them. The measurements here are made up; no program is compiled."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.gpu import record, sizes
from mateconv_jax.errors import UserError
from mateconv_jax.planning import expected, measurements, target
from mateconv_jax.planning.expected import expected_seconds
from mateconv_jax.planning.hlo_report import GROUPS
from mateconv_jax.planning.measurements import Measurement
from mateconv_jax.planning.roofline import LAUNCH, Roofline

H100 = target.GPUS["h100"].device_kind
SLOWDOWNS = np.array([1.5, 4.0, 1.25, 2.0, 1.5])  # of products, attention, elementwise, copies, launches


def bounds(products=0.0, attention=0.0, elementwise=0.0, copies=0.0, kernels=0, network=0.0):
    """In milliseconds."""
    groups = dict(zip(GROUPS, (x / 1e3 for x in (products, attention, elementwise, copies)), strict=True))
    return Roofline(sum(groups.values()), 0.0, kernels * LAUNCH, network / 1e3, 0.0, groups, kernels)


def measurement(rows, work, card=H100, jax="0.11.2", date="2026-11-26", ms=None, **changes):
    """One whose time is `ms`, or what SLOWDOWNS make of `work`: four groups in ms, and launches."""
    exact = float(np.dot(SLOWDOWNS, [*work[:4], work[4] * LAUNCH * 1e3]))
    values = dict(
        card=card, date=date, jax=jax, program="training step", shape=f"{rows} rows", dtype="bfloat16",
        config={"training.batch_size": rows}, decoding={}, ms=ms or exact, groups_ms={},
        bound_ms=dict(zip(GROUPS, work[:4], strict=True)), launches=work[4], bound_jax="0.10.2",
    )  # fmt: skip
    return Measurement(**values | changes)


MEASURED = [
    measurement(rows, work)
    for rows, work in enumerate(
        [
            (20, 1, 1, 0.1, 100),
            (1, 5, 1, 0.1, 100),
            (1, 1, 30, 0.1, 300),
            (2, 1, 2, 8, 50),
            (1, 0.1, 1, 0.1, 20_000),
            (9, 2, 5, 1, 800),
        ]
    )
]


def expect(program, measured, card=H100, dtype="bfloat16"):
    return expected_seconds(program, "training step", dtype, card, measured)


def test_slowdowns_are_found_again_and_predict_another_program():
    assert expected.fit(MEASURED) == pytest.approx(SLOWDOWNS, rel=0.25)  # the pull towards the common slowdown: not exact
    program = bounds(10, 1, 6, 0.5, 600, network=3)
    exact = np.dot(SLOWDOWNS, [10, 1, 6, 0.5, 600 * LAUNCH * 1e3]) + 3
    found = expect(program, MEASURED)
    assert found.seconds * 1e3 == pytest.approx(exact, rel=0.03)
    assert sum(found.groups.values()) == pytest.approx(found.seconds) and found.groups["network"] == 3e-3
    assert found.error < 0.3


def test_one_measurement_gives_its_slowdown_and_itself():
    [one] = [measurement(1, (10, 1, 6, 0.5, 500), ms=37.0)]
    found = expect(bounds(10, 1, 6, 0.5, 500), [one])
    assert found.seconds * 1e3 == pytest.approx(37.0) and found.error is None
    assert expect(bounds(20, 2, 12, 1, 1000), [one]).seconds * 1e3 == pytest.approx(74.0)
    assert found.source == f"1 training step measured on {H100}, jax 0.11.2, 2026-11-26"


def test_never_below_the_bound():
    """A memory-bound kernel that finds its operands in the cache can beat its bound; an expectation does not count on it."""
    program = bounds(10, 1, 6, 0.5, 500)
    assert expect(program, [measurement(1, (10, 1, 6, 0.5, 500), ms=5.0)]).seconds >= sum(program.groups.values())


def test_a_trace_moves_the_efficiency_of_its_group():
    plain = measurement(1, (5, 3, 5, 0.1, 100), ms=30.0)
    traced = dataclasses.replace(plain, groups_ms={"attention": 15.0, "products": 6.0})
    before, after = expected.fit([plain]), expected.fit([traced])
    assert after[1] > 1.3 * before[1] and after[0] < before[0]


def test_a_changed_measurement_changes_the_expectation():
    program = bounds(10, 1, 6, 0.5, 600)
    slower = [dataclasses.replace(m, ms=1.2 * m.ms) for m in MEASURED]
    assert expect(program, slower).seconds == pytest.approx(1.2 * expect(program, MEASURED).seconds, rel=0.02)


def test_only_the_same_card_program_and_dtype_count_and_the_newest_of_each_shape():
    program, old = bounds(10, 1, 6, 0.5, 600), MEASURED[5]
    others = [
        dataclasses.replace(old, card="NVIDIA L4", ms=1e3), dataclasses.replace(old, dtype="float32", ms=1e3),
        dataclasses.replace(old, program="decoding step", ms=1e3), dataclasses.replace(old, jax="0.11.0", date="2026-11-01", ms=1e3),
    ]  # fmt: skip
    assert expect(program, [*MEASURED, *others]) == expect(program, MEASURED)
    newer = dataclasses.replace(old, jax="0.12.0", date="2027-01-02", ms=2 * old.ms)
    found = expect(program, [newer, *MEASURED])
    assert found.seconds > 1.05 * expect(program, MEASURED).seconds
    assert found.source == f"6 training steps measured on {H100}, jax 0.11.2, 0.12.0, 2026-11-26 to 2027-01-02"


def test_a_card_that_was_not_measured_gets_no_expectation_from_another():
    a100 = target.GPUS["a100"].device_kind
    assert expect(bounds(1), MEASURED, card=a100) is None and expect(bounds(1), []) is None
    assert f"nothing was measured on a {a100} (bash" in expected.source(MEASURED, "training step", "bfloat16", a100)
    assert f"on a {H100} as a training step in float32" in expected.source(MEASURED, "training step", "float32", H100)
    assert "no GPU has been measured yet" in expected.source([], "training step", "bfloat16", H100)


# ---- the package's own measurements ------------------------------------------------------------------------------------------


def test_the_packages_measurements_are_predicted_from_each_other():
    """The bar: 10 % root mean square. The figures stand in docs/planning.md."""
    measured = measurements.load()
    for program in measurements.PROGRAMS:
        known = expected.relevant(measured, program, "bfloat16", H100)
        assert len(known) >= 5
        errors = [ms / m.ms - 1 for ms, m in zip(expected.left_out(known), known, strict=True)]
        assert np.sqrt(np.mean(np.square(errors))) < 0.1 and max(map(abs, errors)) < 0.2


def test_the_packages_measurements_are_of_configurations_that_exist():
    for m in measurements.load():
        sizes.config_from(m.config)
        assert target.by_device_kind(m.card) is not None


# ---- the file ----------------------------------------------------------------------------------------------------------------


def test_recording_adds_and_replaces_its_own_only(tmp_path):
    path = tmp_path / "measurements.json"
    assert measurements.load(path) == []
    measurements.record(MEASURED[:2], path)
    assert measurements.load(path) == MEASURED[:2]
    newer = dataclasses.replace(MEASURED[0], jax="0.12.0")
    again = dataclasses.replace(MEASURED[1], date="2027-01-01", ms=3.0, shape="another name")
    measurements.record([again, newer], path)
    text = path.read_text(encoding="utf-8")
    assert measurements.load(path) == [MEASURED[0], again, newer]
    measurements.record([again, newer], path)
    assert path.read_text(encoding="utf-8") == text and len(text.splitlines()) == 3 + 2  # an entry a line


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "measurements.json"
    measurements.record(MEASURED[:2], path)
    before = path.read_bytes()

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            measurements.record(MEASURED, path)
    assert path.read_bytes() == before
    measurements.record(MEASURED, path)
    assert measurements.load(path) == MEASURED and list(tmp_path.iterdir()) == [path]


GOOD = dataclasses.asdict(MEASURED[0])


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "line 1: not JSON: Expecting value (expected a JSON list of measurements)"),
        ('[\n{"card": "x",\n}]', "line 3: not JSON"),
        ("{}", "a JSON dict (expected a list of measurements)"),
        ("[3]", "entry 1: 3 (expected an object with exactly card, date"),
        (json.dumps([GOOD, {k: v for k, v in GOOD.items() if k != "ms"}]), "entry 2: ['bound_jax'"),
        (json.dumps([GOOD | {"ms": "fast"}]), "entry 1: ms: 'fast' is not a number"),
        (json.dumps([GOOD | {"ms": 0}]), "entry 1: ms, bound_ms and launches: 0"),
        (json.dumps([GOOD | {"ms": float("nan")}]), "entry 1: ms, bound_ms and launches: nan"),
        (json.dumps([GOOD | {"config": []}]), "entry 1: config: [] is not an object"),
        (json.dumps([GOOD | {"program": "prefill"}]), "entry 1: program: 'prefill' is unknown (expected one of training step"),
        (json.dumps([GOOD | {"bound_ms": {"matmuls": 3}}]), "entry 1: bound_ms: {'matmuls': 3} (expected milliseconds of products"),
    ],
)  # fmt: skip
def test_a_broken_file_is_one_line(tmp_path, text, message):
    path = tmp_path / "measurements.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        measurements.load(path)
    assert f"{path}: " in str(error.value) and message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError):  # and recording does not overwrite it
        measurements.record(MEASURED, path)
    assert path.read_text(encoding="utf-8") == text


# ---- bash benchmarks/gpu.sh --record -----------------------------------------------------------------------------------------

BASE = sizes.BASE.changes(dry_run=False)
RESULTS = {
    "card": f"{H100}, 580.159.04, 81559 MiB",
    "started": "2026-12-01 10:00:00",
    "versions": {"jax": "0.12.0"},
    "parts": {
        "host": {"rows": [{"what": "dispatch of a step", "measured": "2.58 ms"}]},
        "training": {
            "rows": [
                {"what": "base, 32 x 512", "seconds": 0.01085432, "config": BASE, "dtype": "bfloat16"},
                {"what": "118 M", "measured": "failed"},
                {
                    "what": "our step, without command buffers", "config": BASE,
                    "groups": {"matmuls": {"ms": 4.3}, "elementwise": {"ms": 3}, "scatter": {"ms": 0.5}, "attention": {"ms": 2}},
                },
            ]
        },
        "decoding": {
            "rows": [
                {
                    "what": "batch 16, sampled", "seconds": 0.000382, "config": {}, "dtype": "bfloat16",
                    "decoding": {"rows": 16, "cache": 256, "do_sample": True},
                }
            ]
        },
    },
}  # fmt: skip


def test_timed_rows_become_measurements(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(record, "compiled_bounds", lambda row, gpu: bounds(2.7261234, 0.4, 2.9, 0.03, 505))
    path, results = tmp_path / "measurements.json", tmp_path / "gpu.json"
    results.write_text(json.dumps(RESULTS))
    for _ in range(2):
        record.main([str(results), "--to", str(path)])
        step, decoding = measurements.load(path)
    assert (step.card, step.date, step.jax, step.ms) == (H100, "2026-12-01", "0.12.0", 10.85)
    assert step.groups_ms == {"products": 4.3, "elementwise": 3.5, "attention": 2.0} and decoding.groups_ms == {}
    assert step.bound_ms == {"products": 2.726, "attention": 0.4, "elementwise": 2.9, "copies": 0.03} and step.launches == 505
    assert (decoding.program, decoding.ms, decoding.decoding["rows"]) == ("decoding step", 0.382, 16)
    assert "2 measurements on" in capsys.readouterr().out


def test_a_card_without_data_sheet_is_not_recorded():
    with pytest.raises(UserError, match="no data sheet for 'no NVIDIA GPU'"):
        record.card(RESULTS | {"card": "no NVIDIA GPU, 2 CPU cores"})


def test_configurations_are_written_as_what_differs():
    assert BASE == {"data.seq_len": 512, "training.batch_size": 32}
    case = sizes.TRAINING[3]
    assert case.changes(dry_run=False) == {
        "model.dim": 1280, "model.n_layers": 18, "model.n_heads": 20, "model.n_kv_heads": 10, "model.max_seq_len": 1024,
        "data.seq_len": 1024, "training.batch_size": 16,
    }  # fmt: skip
    assert sizes.config_from(case.changes(True, use_ema=True)) == case.config(True, use_ema=True)
