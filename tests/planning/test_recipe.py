"""Recipes on machines whose memory and speed are a formula."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from mateconv_jax import config as config_lib
from mateconv_jax.errors import UserError
from mateconv_jax.model import flops
from mateconv_jax.planning import machine, recipe as recipe_lib, recipe_reasons, recipe_text, roofline, rules, step_cost, target
from mateconv_jax.planning.measurements import Measurement
from mateconv_jax.planning.plan import Cluster
from mateconv_jax.planning.recipe import Data, Dial
from mateconv_jax.training import setup
from tests.planning.conftest import needs_compiler

DATA = Data("data/zh", 2_000_000_000, 6400, 512, True)
GPUS = st.sampled_from(sorted(target.GPUS))
few = settings(max_examples=20, deadline=None)


def estimated_machine(name, devices=1):
    gpu = target.GPUS[name]
    guess = devices * gpu.half * step_cost.measured_mfu(100e6)
    return recipe_lib.Machine(gpu.device_kind, devices, lambda config: step_cost.estimated(config, gpu, devices), guess)


def config_of(recipe):
    return config_lib.resolve(recipe_reasons.config_of(recipe_reasons.choices(recipe, "out")))


@few
@given(GPUS, st.sampled_from([1, 2, 8]), st.floats(1e6, 2e9), st.floats(1e6, 1e12))
def test_whatever_is_asked_fits_and_adds_up(name, devices, parameters, unique_tokens):
    data = dataclasses.replace(DATA, tokens=int(unique_tokens))
    try:
        recipe = recipe_lib.make_recipe(data, Dial(parameters=parameters), estimated_machine(name, devices))
    except UserError as error:
        assert "do not fit" in str(error) and parameters > 5e8
        return
    config, training = config_of(recipe), recipe.layout.training
    assert recipe.cost.fits and training.batch_size % devices == 0
    assert training.batch_size * training.accumulation_steps == recipe.steps.rows
    assert training.max_steps is None and config.training.max_steps == recipe.steps.steps
    assert 0 < config.training.warmup_ratio <= 0.1
    assert config.training.min_lr < config.training.learning_rate < 0.1
    assert recipe.epochs <= rules.MAX_EPOCHS * 1.5  # a step may be larger than very few data


@few
@given(GPUS, st.floats(0.05, 300))
def test_the_run_takes_the_hours_it_may(name, hours):
    data = dataclasses.replace(DATA, tokens=10**13)
    recipe = recipe_lib.make_recipe(data, Dial(hours=hours), estimated_machine(name))
    assert recipe.hours <= hours * (1 + 1e-9)
    assert recipe.hours > 0.85 * hours and 14 < recipe.tokens / recipe.parameters < 30


def test_a_compiled_step_takes_the_time_that_was_measured_on_such_a_gpu_or_else_on_another(monkeypatch):
    bounds = roofline.Roofline(0.01, 0.0, 0.0, 0.0, 0.0, {"products": 0.01, "attention": 0, "elementwise": 0, "copies": 0}, 0)
    program = {"memory": {"peak": 1, "available": 2}, "roofline": dataclasses.asdict(bounds) | {"seconds": bounds.seconds}}
    monkeypatch.setattr(step_cost, "make_plan", lambda *args, **kwargs: {"training": program, "dtype": "bfloat16"})

    def cost(measured):
        gpu = target.GPUS["4090"]
        return step_cost.compiled(None, Cluster(gpu.device_kind, gpu, [], 1, 2, False, measured))

    def twice_the_bound(card, times=2):
        values = dict(config={}, decoding={}, groups_ms={}, launches=0, shape="", date="", jax="", bound_jax="")
        return Measurement(card, program="training step", dtype="bfloat16", ms=times, bound_ms={"products": 1}, **values)

    h100, own = twice_the_bound(target.GPUS["h100"].device_kind), twice_the_bound(target.GPUS["4090"].device_kind, 3)
    assert cost([]).seconds == cost([]).seconds_at_best == 0.01 and "no step was measured in bfloat16" in cost([]).seconds_from
    assert cost([h100]).seconds == pytest.approx(0.02) and h100.card in cost([h100]).seconds_from
    assert cost([h100, h100, own]).seconds == pytest.approx(0.03) and own.card in cost([h100, own]).seconds_from


def test_two_dials_leave_the_third_to_the_machine():
    h100 = estimated_machine("h100")
    by_tokens = recipe_lib.make_recipe(DATA, Dial(hours=10, tokens=1e9), h100)
    assert by_tokens.tokens == pytest.approx(1e9, rel=0.1) and by_tokens.hours == pytest.approx(10, rel=0.15)
    by_parameters = recipe_lib.make_recipe(DATA, Dial(hours=1, parameters=1e8), h100)
    assert by_parameters.parameters == pytest.approx(1e8, rel=0.1) and by_parameters.hours == pytest.approx(1, rel=0.15)


def test_what_does_not_fit_is_split_then_recomputed_then_sharded():
    def layout(name, devices, parameters):
        recipe = recipe_lib.make_recipe(DATA, Dial(parameters=parameters), estimated_machine(name, devices))
        keys = {choice.key: choice.value for choice in recipe_reasons.choices(recipe, "out")}
        return recipe.layout.training.accumulation_steps, keys.get("training.remat"), keys.get("mesh.fsdp")

    assert layout("h100", 1, 27e6) == (1, None, None)
    accumulation, remat, fsdp = layout("4090", 1, 110e6)
    assert accumulation > 1 and (remat, fsdp) == (None, None)
    assert layout("4090", 1, 1.1e9)[1:] == ("full", None)
    assert layout("4090", 8, 3e9)[1:] == ("full", 8)


def test_a_file_is_the_configuration_of_the_recipe(tmp_path):
    recipe = recipe_lib.make_recipe(DATA, Dial(parameters=3e9), estimated_machine("4090", 8))
    chosen = recipe_reasons.choices(recipe, "out")
    path = tmp_path / "mine.py"
    path.write_text(recipe_text.config_file(recipe, chosen, "a\nb", "c\nd"), encoding="utf-8")
    loaded = config_lib.resolve(config_lib.from_command_line(["train", f"--config={path}"]))
    assert loaded.to_dict() == config_of(recipe).to_dict()


def test_the_user_is_warned():
    def warnings(dial, **data):
        recipe = recipe_lib.make_recipe(dataclasses.replace(DATA, **data), dial, estimated_machine("4090"))
        return " | ".join(recipe_reasons.warnings(recipe))

    assert "learn them by heart" not in warnings(Dial(tokens=4e9, parameters=2e8))
    assert "10.0 epochs" in warnings(Dial(tokens=2e10))
    limited = warnings(Dial(hours=100), tokens=10**7)
    assert "the data are the limit: 4 epochs are 40,000,000 tokens" in limited and "of your 100 hours" in limited
    assert "a smaller model would be as good" in warnings(Dial(tokens=1e8, parameters=1e9))
    assert "no validation split" in warnings(Dial(parameters=1e8), has_validation=False)


@needs_compiler
@pytest.mark.slow  # compiles four steps: minutes
@pytest.mark.parametrize("dim, n_layers, rows, remat", [(512, 8, 32, "none"), (896, 12, 16, "none"), (1280, 18, 16, "full")])
def test_estimates_are_near_the_compiled_memory(dim, n_layers, rows, remat):
    shape, config = rules.Shape(dim, n_layers), config_lib.default_config()
    config.model.update(dict(dim=dim, n_layers=n_layers, n_heads=shape.n_heads, n_kv_heads=shape.n_kv_heads))
    config.training.update(dict(batch_size=rows, remat=remat))
    compiled = machine.machine_of("h100", 1, 1).cost(config_lib.resolve(config))
    estimate = step_cost.estimated_memory(shape, 6400, rows * 512, remat != "none")
    assert 0.8 < estimate / compiled.memory < 1.25


@pytest.mark.parametrize("name, size", [("110m", 110e6), ("340m", 340e6), ("1b", 1e9)])
def test_the_sizes_in_configs_are_what_the_rules_give(name, size):
    config = config_lib.resolve(config_lib.from_command_line(["train", f"--config=configs/{name}.py"]))
    shape, training = rules.shape(size, 6400), config.training
    c = setup.model_config(config)
    assert (c.dim, c.n_layers, c.n_heads, c.n_kv_heads) == (shape.dim, shape.n_layers, shape.n_heads, shape.n_kv_heads)
    parameters = flops.parameters(c)[0]
    assert f'"""{parameters:,} parameters' in Path(f"configs/{name}.py").read_text(encoding="utf-8")
    steps = rules.steps(rules.TOKENS_PER_PARAMETER * parameters, 512, 1)
    assert (training.max_steps, training.batch_size * training.accumulation_steps) == (steps.steps, steps.rows)
    assert training.warmup_ratio == rules.warmup_ratio(steps.steps)
    assert training.learning_rate == rules.rounded(rules.learning_rate(shape.dim, steps.rows * 512))
    assert training.matrix_lr_ratio == rules.rounded(rules.matrix_lr_ratio(shape.dim))
    assert training.min_lr == pytest.approx(training.learning_rate / 10)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"content": "pairs"}, "has preferences; recipes are for pretraining"),
        ({"splits": {"train": {"rows": 0}}}, "has no training rows"),
    ],
)
def test_data_that_is_not_for_pretraining_is_refused(tmp_path, changes, message):
    metadata = {"seq_len": 64, "vocab_size": 400, "tokenizer_fingerprint": "", "splits": {"train": {"rows": 100}}}
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    assert recipe_lib.read_data(str(tmp_path)) == Data(str(tmp_path), 6400, 400, 64, False)
    (tmp_path / "metadata.json").write_text(json.dumps(metadata | changes))
    with pytest.raises(UserError, match=message):
        recipe_lib.read_data(str(tmp_path))


def test_several_datasets_are_one_and_must_fit_each_other(tmp_path):
    metadata = {"seq_len": 64, "vocab_size": 400, "tokenizer_fingerprint": "", "splits": {"train": {"rows": 100}}}
    for name, changes in (("a", {}), ("b", {"learned": True}), ("c", {"vocab_size": 500})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metadata.json").write_text(json.dumps(metadata | changes))
    both = f"{tmp_path}/a:0.7,{tmp_path}/b:0.3"
    assert recipe_lib.read_data(both) == Data(both, 12800, 400, 64, False)
    with pytest.raises(UserError, match="500 tokens .* with one tokenizer"):
        recipe_lib.read_data(f"{tmp_path}/a:0.7,{tmp_path}/c:0.3")
