import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from mateconv_jax import config as config_lib, plan as command
from mateconv_jax.errors import exit_code
from mateconv_jax.model import flops
from mateconv_jax.planning import measurements, plan as plan_lib, target
from mateconv_jax.runtime import xla_flags
from tests.data.build.preparing import prepare, write_jsonl
from tests.planning.conftest import needs_compiler
from tests.planning.test_expected import measurement

BASE = f"--config={Path(__file__).parents[2] / 'configs/base.py'}"
TINY = [
    "--config.model.dim=64", "--config.model.n_layers=1", "--config.model.n_heads=2", "--config.model.n_kv_heads=1",
    "--config.model.vocab_size=256", "--config.model.max_seq_len=64", "--config.data.seq_len=64",
    "--config.training.batch_size=8", "--config.training.max_steps=100",
]  # fmt: skip


def run(monkeypatch, capsys, *arguments):
    argv = ["plan", BASE, *arguments]
    monkeypatch.setattr(sys, "argv", argv)
    code = exit_code(command.main, argv)
    return code, *capsys.readouterr()


@needs_compiler
def test_a_plan_for_gpus_that_are_not_there(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(measurements, "PATH", tmp_path / "measurements.json")
    card = target.GPUS["a100"].device_kind
    measurements.record([measurement(rows, (10, 1, 6, 0.5, 500), card, ms=3 * 18.5) for rows in (1, 2)], measurements.PATH)
    flags = [*TINY, "--gpu=a100", "--devices=2", "--dollars_per_gpu_hour=3", "--quick"]
    code, out, _ = run(monkeypatch, capsys, *flags, "--json")
    plan = json.loads(out)
    assert code == 0 and (plan["device"], plan["devices"], plan["dtype"]) == ("NVIDIA A100-SXM4-80GB", 2, "bfloat16")
    training, the_run = plan["training"], plan["run"]
    assert training["memory"]["fits"] and training["memory"]["available"] == int(0.75 * 80 * 2**30)
    assert sum(training["memory"]["parts"].values()) == training["memory"]["peak"]
    parts = training["memory"]["parts"]
    assert training["memory"]["checkpoint_copy"] == parts["parameters"] + parts["EMA"] + parts["optimizer"] > 0
    assert training["memory"]["fits_with_copy"]
    assert training["fused_attention"] == {"forward": 1, "backward": 1}
    bounds = training["roofline"]
    assert bounds["seconds"] == pytest.approx(sum(bounds[part] for part in ("arithmetic", "memory", "launches", "network")))
    assert training["tokens_per_second"] == pytest.approx(8 * 64 / bounds["seconds"])
    assert the_run["tokens"] == 100 * 8 * 64
    assert the_run["dollars"] == pytest.approx(3 * 2 * the_run["tokens"] / training["tokens_per_second"] / 3600)
    expected = training["expected"]
    assert expected["seconds"] == pytest.approx(
        3 * (sum(bounds["groups"].values()) + bounds["kernels"] * 2e-6) + bounds["network"], rel=0.01
    )
    assert (
        expected["tokens_per_second"] == pytest.approx(8 * 64 / expected["seconds"]) and 0 < expected["mfu"] < training["mfu"]
    )
    assert the_run["expected_hours"] / the_run["hours"] == pytest.approx(expected["seconds"] / bounds["seconds"])
    assert (
        the_run["expected_dollars"]
        == pytest.approx(3 * the_run["expected_gpu_hours"])
        == pytest.approx(6 * the_run["expected_hours"])
    )
    assert plan["expected_from"] == expected["source"] == f"2 training steps measured on {card}, jax 0.11.2, 2026-11-26"
    assert len(plan["unknown"]) == 3 and "decoding" not in plan and "measured" not in plan

    from rich.console import Console

    from mateconv_jax.planning.tables import print_plan

    print_plan(plan, Console(width=200))
    shown = capsys.readouterr().out
    assert "copy for a checkpoint (fits beside the step)" in shown
    assert "expected time of a step, by kernel group" in shown and f"expected from 2 training steps measured on {card}" in shown
    assert "each predicted from the others, they are off by 0.0%" in shown and " dollars at best; expected 0.00 hours" in shown
    assert "2 x NVIDIA A100-SXM4-80GB" in shown and f"{plan['parameters']:,} parameters" in shown and "dollars at best" in shown


@pytest.mark.slow
def test_the_devices_that_are_here_are_measured(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, *TINY, "--gpu=this", "--quick", "--json")
    plan = json.loads(out)
    assert code == 0 and plan["device"] == "cpu" and plan["dtype"] == "float32"
    assert plan["measured"]["tokens_per_second"] == pytest.approx(8 * 64 / plan["measured"]["seconds"])
    assert plan["training"]["memory"]["parts"]["temporaries"] > 0
    assert 0.9 < plan["training"]["flops_ratio"] < 1.5 and "roofline" not in plan["training"]
    assert plan["unknown"] == ["The peak speed of a cpu: no data sheet values for it."]


@needs_compiler
@pytest.mark.slow
def test_the_largest_batch_fits_and_a_larger_one_does_not(monkeypatch, capsys):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.005")
    code, out, _ = run(monkeypatch, capsys, *TINY, "--config.model.n_layers=4", "--gpu=h100", "--json")
    plan = json.loads(out)
    rows = plan["largest_rows_per_device"]
    assert code == 0 and rows["full"] > 1.2 * rows["none"] > 8
    for more, fits in ((0, True), (rows["none"] // 10, False)):
        batch = f"--config.training.batch_size={rows['none'] + more}"
        _, out, _ = run(monkeypatch, capsys, *TINY, "--config.model.n_layers=4", batch, "--gpu=h100", "--json", "--quick")
        memory = json.loads(out)["training"]["memory"]
        assert memory["fits"] == fits and not memory["fits_with_copy"]
    for decoding in plan["decoding"]:
        cache = decoding["step"]["memory"]["parts"]["cache"]
        assert cache == decoding["rows"] * 64 * 32 * 2 * 2 * 4 and decoding["step"]["memory"]["donated"] >= cache


@pytest.mark.parametrize("per_row, memory, most", [(10, 1000, 88), (1, 1000, 912), (300, 500, 1), (1000, 500, None)])
def test_the_largest_batch_is_found_in_few_compilations(per_row, memory, most):
    """100 bytes of state, a slope that is not quite constant."""
    asked = []

    def peak(rows):
        asked.append(rows)
        return 100 + per_row * rows - rows // 50

    found = plan_lib.largest_batch(peak, memory, {}, 4)
    assert found is most if most is None else most * 0.95 <= found and 100 + per_row * found - found // 50 <= memory
    assert len(asked) <= 6 and len(asked) == len(set(asked))


def test_how_long_a_run_is(tmp_path):
    config = config_lib.default_config()
    assert plan_lib.run_length(config)[0] is None
    (tmp_path / "data.bin").write_bytes(bytes(2 * (512 * 640 + 1)))
    config.data.train_data_path = str(tmp_path / "data.bin")
    assert plan_lib.run_length(config) == (15 * 640 // 32, "15 epochs of 640 rows")
    (tmp_path / "metadata.json").write_text(
        json.dumps({"seq_len": 512, "vocab_size": 6400, "tokenizer_fingerprint": "", "splits": {"train": {"rows": 64}}})
    )
    config.data.train_data_path = str(tmp_path)
    assert plan_lib.run_length(config) == (30, "15 epochs of 64 rows")
    config.data.train_data_path = "none"
    assert plan_lib.run_length(config) == (None, "unknown length: no dataset at 'none'")
    config.training.max_steps = 7
    assert plan_lib.run_length(config) == (7, "training.max_steps")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--gpu=h900"], "--gpu: 'h900' is unknown (expected one of a100, a100-40, h100"),
        (["--gpu=h100", "--devices=3", "--hosts=2"], "--devices: 3 GPUs cannot be spread over 2 hosts"),
        (["--gpu=h100", "--devices=0"], "--devices: 0 GPUs"),
        pytest.param(
            ["--gpu=h100", "--devices=3"], "training.batch_size: 32 rows cannot be split over 3", marks=needs_compiler
        ),
        pytest.param(
            ["--gpu=h100", "--config.data.seq_len=511", "--config.model.attention=cudnn"],
            "model.attention: cudnn is unavailable: it needs an even length, and data.seq_len is 511 (expected auto, blocked or xla)",
            marks=needs_compiler,
        ),
        (["--gpu=h100", "--config.training.nothing=3"], "--config.training.nothing: unknown key"),
    ],
)
def test_what_cannot_be_planned_is_one_line(monkeypatch, capsys, flags, message):
    code, _, error = run(monkeypatch, capsys, *flags)
    assert code == 2 and message in error.splitlines()[-1]


def test_without_the_compiler_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(target, "find_spec", lambda name: None)
    code, _, error = run(monkeypatch, capsys, "--gpu=h100")
    assert code == 2 and "pip install jax-cuda13-pjrt==" in error


def test_planning_imports_no_tensorflow_and_the_compiler_alone_turns_jax_to_the_cpu():
    code = (
        "import os; os.environ.pop('JAX_PLATFORMS', None); import sys; import mateconv_jax.plan, mateconv_jax.planning.plan, jax; "
        "jax.devices(); print([m for m in ('tensorflow', 'clu', 'orbax') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]" and result.stderr == ""


def test_a_broken_file_of_measurements_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(measurements, "PATH", tmp_path / "measurements.json")
    measurements.PATH.write_text("[{}]")
    code, _, error = run(monkeypatch, capsys, "--gpu=h100")
    assert code == 2 and f"{measurements.PATH}: entry 1: []" in error.splitlines()[-1]


def test_the_source_of_an_expectation_in_words():
    from mateconv_jax.planning.tables import source_in_words

    assert source_in_words("nothing expected: …", None) == "nothing expected: …"
    assert source_in_words("1 step", {"error": None}) == "expected from 1 step"


def test_data_sheets_agree_with_the_peaks_of_mfu():
    for gpu in target.GPUS.values():
        assert flops.peak_flops(gpu.device_kind, jnp.dtype("bfloat16")) == gpu.half
        assert target.by_device_kind(gpu.device_kind) is gpu


def test_xla_flags_are_the_users_first(monkeypatch):
    for platform, options in xla_flags.OPTIONS.items():
        [(flag, _)] = options.items()
        monkeypatch.setenv("XLA_FLAGS", "--xla_other=1")
        assert xla_flags.compiler_options(platform) == options
        monkeypatch.setenv("XLA_FLAGS", f"--{flag}=1")
        assert xla_flags.compiler_options(platform) == {}


@pytest.mark.slow
def test_a_plan_of_preferences_counts_what_is_scored_before_the_first_step(monkeypatch, capsys, dataset_folder, tmp_path):
    records = [{"prompt": f"{i}？", "chosen": "好。", "rejected": "不好。"} for i in range(20)]
    flags = ("--tokenizer", dataset_folder / "tokenizer", "--seq_len", 64, "--val_fraction", "0")
    pairs = prepare(write_jsonl(tmp_path / "raw.jsonl", records), tmp_path / "pairs", *flags)
    capsys.readouterr()
    flags = [*TINY, "--config.model.vocab_size=400", "--config.loss.kind=sigmoid", f"--config.data.train_data_path={pairs}"]
    code, out, _ = run(monkeypatch, capsys, *flags, "--gpu=this", "--quick", "--json")
    plan = json.loads(out)
    assert code == 0 and plan["tokens_per_step"] == 8 * 2 * 64
    reference = plan["reference"]
    assert reference["pairs"] == 20 and reference["seconds"] == pytest.approx(3 * reference["seconds_per_batch"])
    assert 0.2 < reference["flops"] / plan["training"]["flops"] < 0.5  # a forward pass is a third
    seconds = plan["run"]["tokens"] / plan["measured"]["tokens_per_second"] + reference["seconds"]
    assert plan["run"]["hours"] == pytest.approx(seconds / 3600)

    from rich.console import Console

    from mateconv_jax.planning.tables import print_plan

    print_plan(plan, Console(width=200))
    assert "reference: 20 pairs scored once before the first step" in capsys.readouterr().out


@pytest.mark.slow
def test_a_plan_of_rewards_counts_the_rollout_and_the_reference(monkeypatch, capsys, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "一"}\n' * 50)
    flags = [*TINY[:-1], f"--config.data.train_data_path={prompts}", "--config.training.epochs=2", "--config.loss.kind=grpo"]
    flags += ["--config.rollout.samples=4", "--config.rollout.max_new_tokens=32", "--config.rollout.iterations=2"]
    plans = []
    for beta in (0.0, 0.1):
        code, out, _ = run(monkeypatch, capsys, *flags, f"--config.loss.beta={beta}", "--gpu=this", "--quick", "--json")
        assert code == 0
        plans.append(json.loads(out))
    without, plan = plans
    assert plan["run"]["steps"] == 2 * 50 * 4 * 2 // 8 and plan["run"]["length_from"] == "2 epochs of 50 prompts"
    parts = plan["rollout"]["memory"]["parts"]
    assert plan["rollout"]["rows"] == 8 and parts["reference"] == parts["decoding weights"] == parts["parameters"]  # fp32
    assert plan["training"]["memory"]["parts"]["reference"] == parts["reference"]
    more = plan["rollout"]["memory"]["peak"] - without["rollout"]["memory"]["peak"]
    assert more == parts["reference"] and "reference" not in without["rollout"]["memory"]["parts"]

    from rich.console import Console

    from mateconv_jax.planning.tables import print_plan

    print_plan(plan, Console(width=300))
    assert "rollout: 8 answers at a time per device" in capsys.readouterr().out
