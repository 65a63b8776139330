"""What a person sees of a run while it goes: the header, samples, a profile; and spikes that are left out."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mateconv_jax import GenerationConfig, TextGenerator
from mateconv_jax.errors import UserError
from mateconv_jax.terminal import escaped
from mateconv_jax.training import loop
from mateconv_jax.training.train_state import LossAverage
from tests.training.runs import losses_of, metrics_of, train


def test_the_header(tiny_config, tmp_path):
    train(tiny_config, tmp_path / "out", max_steps=1)
    log = (tmp_path / "out" / "train.log").read_text()
    assert "| blocks/0/attention/wqkv_JND" in log and "(8, 8, 32)" in log
    [n_params] = re.findall(r"Total: ([0-9,]+)", log)
    assert f"model: {n_params} parameters, computed in float32, blocked attention" in log
    rows, tokens = re.findall(r"data: ([0-9,]+) rows of 32 tokens, ([0-9,]+) tokens per epoch", log)[0]
    assert int(rows.replace(",", "")) * 32 == int(tokens.replace(",", ""))
    [(total, state)] = re.findall(r"the compiled step needs ([0-9.]+) GB per device, ([0-9.]+) of it for state", log)
    assert float(total) >= float(state) > 0


def first_line(text):
    """As the log shows it."""
    return escaped(text).split("\n")[0]


@pytest.mark.slow
def test_samples_are_the_ema_models_and_change_nothing_else(tiny_config, tmp_path):
    options = dict(max_steps=4, use_ema=True, ema_decay=0.5, save_interval=2, keep_latest=9)
    train(tiny_config, tmp_path / "without", **options)
    train(tiny_config, tmp_path / "with", **options, samples_interval="50%", sample_prompts=("熊猫", ""))
    log = (tmp_path / "with" / "train.log").read_text()
    said = dict(re.findall(r"sample of step (\d+): 熊猫\|(.*)", log))
    assert list(said) == ["2", "4"] and said["2"] != said["4"]
    generator = TextGenerator.from_pretrained(tmp_path / "with")
    assert first_line(generator.generate("熊猫", GenerationConfig(max_new_tokens=64))) == said["4"]
    assert losses_of(tmp_path / "with") == losses_of(tmp_path / "without")
    assert "sample of" not in (tmp_path / "without" / "train.log").read_text()
    board = EventAccumulator(str(tmp_path / "with" / "tensorboard"))
    board.Reload()
    texts = [event.tensor_proto.string_val[0].decode() for event in board.Tensors("samples/0")]
    assert [first_line(text) for text in texts] == ["熊猫" + said["2"], "熊猫" + said["4"]]


def test_a_prompt_that_does_not_fit_is_an_error_before_the_first_step(tiny_config, tmp_path):
    with pytest.raises(UserError, match=r"training\.sample_prompts: [0-9]+ tokens leave no room"):
        train(tiny_config, tmp_path / "out", samples_interval=1, sample_prompts=("鑫" * 60 + "熊" * 20,))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("profile_step", [2, 6])
def test_a_profile_is_written_for_tensorboard(tiny_config, tmp_path, profile_step):
    """Also of the last steps of a run, when they are fewer."""
    train(tiny_config, tmp_path / "out", max_steps=8, profile_step=profile_step)
    [trace] = (tmp_path / "out" / "tensorboard" / "plugins" / "profile").glob("*/*.xplane.pb")
    assert trace.stat().st_size > 1000


@given(st.integers(1, 250), st.integers(0, 10**6))
def test_the_average_of_losses_is_numpys(n, seed):
    """Of all, up to 100; then exponential with a hundredth."""
    losses = np.random.default_rng(seed).normal(3, 1, n).astype(np.float32)
    average = LossAverage(jnp.float32(0), jnp.float32(0), jnp.int32(0))
    for loss in losses:
        average = average.update(loss)
    mean, variance = losses[:100].mean(), losses[:100].var()
    for loss in losses[100:]:
        difference = loss - mean
        mean, variance = mean + 0.01 * difference, 0.99 * (variance + 0.01 * difference**2)
    np.testing.assert_allclose(average.mean, mean, rtol=1e-4)
    np.testing.assert_allclose(average.variance, variance, rtol=1e-3, atol=1e-5)
    for bad in (np.nan, np.inf):
        assert average.update(jnp.float32(bad)).mean == average.mean
    if n >= 100:
        assert not average.is_spike(mean + 2.9 * variance**0.5, 3.0) and average.is_spike(mean + 3.1 * variance**0.5, 3.0)
    else:
        assert not average.is_spike(jnp.float32(1e6), 3.0)


@pytest.mark.parametrize("skip_spikes", [0.0, 1.5])
@pytest.mark.slow
def test_a_spike_is_left_out_on_request(tiny_config, tmp_path, monkeypatch, skip_spikes):
    """Step 20 reads rows of <pad>, which occurs nowhere else."""
    monkeypatch.setattr(LossAverage, "OVER", 5)
    compile_step, changed = loop.compile_step, []

    def compiling(*args):
        step = compile_step(*args)

        def run(state, batch):
            if int(state.step) == 19:
                batch = batch | {"tokens": jnp.full_like(batch["tokens"], 3)}
            before = np.asarray(state.params["embedding_VD"][...])
            state, metrics = step(state, batch)
            changed.append(bool((before != np.asarray(state.params["embedding_VD"][...])).any()))
            return state, metrics

        return run

    monkeypatch.setattr(loop, "compile_step", compiling)
    train(tiny_config, tmp_path / "out", max_steps=21, skip_spikes=skip_spikes, eval_interval=99)
    log = (tmp_path / "out" / "train.log").read_text()
    said = re.search(r"step 20: the loss [0-9.]+ is a spike, the update is skipped \(1 in a row\); rows \[", log)
    assert bool(said) == bool(skip_spikes)
    assert changed[19] == (not skip_spikes)
    assert [m["bad_steps"] for m in metrics_of(tmp_path / "out") if "bad_steps" in m][19] == bool(skip_spikes)
