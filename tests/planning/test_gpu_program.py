"""What the base model's programs are on H100s, compiled for them without one."""

import pytest

from mateconv_jax import config as config_lib
from mateconv_jax.model import flops
from mateconv_jax.model.config import ModelConfig, ModelOptions
from mateconv_jax.planning import programs, target
from mateconv_jax.planning.hlo_report import n_bytes, parse
from mateconv_jax.planning.roofline import roofline
from tests.planning.conftest import base_config, compile_step, needs_compiler

pytestmark = needs_compiler

PARAMETERS = 26_878_464
TOKENS = 32 * 512  # of a device


def model_config():
    return ModelConfig.make(
        config_lib.options(ModelOptions, config_lib.resolve(base_config()).model), "auto", target.GPUS["h100"].device
    )


def gradient_exchanges(program):
    return [c for c in program.report.collectives if c.bytes > 1000]


def test_attention_is_cudnns_in_every_layer(base_step):
    assert [a.direction for a in base_step.report.attention] == 8 * ["forward"] + 8 * ["backward"]


def test_every_product_is_of_bfloat16(base_step):
    """fp32 results are parts of sums over tokens (split-K), which are added up in fp32."""
    assert set(base_step.report.matmuls_by_dtype()) == {"bf16 x bf16 -> bf16", "bf16 x bf16 -> f32"}


def test_hardly_more_arithmetic_than_the_model_needs(base_step):
    """cuDNN's backward pass computes the scores once more: 1.2 %."""
    needed = flops.training_flops_per_token(model_config(), 512) * TOKENS
    assert needed <= base_step.report.flops() <= 1.02 * needed


def test_gradients_are_summed_in_fp32_beside_the_backward_pass(base_step):
    exchanges = gradient_exchanges(base_step)
    assert {c.opcode for c in exchanges} == {"all-reduce"} and {c.dtypes for c in exchanges} == {("f32",)}
    assert sum(c.bytes for c in exchanges) == pytest.approx(4 * PARAMETERS, abs=100)
    assert 3 <= len(exchanges) <= 5 and all(c.devices == 8 for c in exchanges)
    assert all(c.is_async for c in base_step.report.collectives)
    # The first bucket is on its way while the backward pass has more to do than it takes; only the last ones are waited for.
    bounds = roofline(base_step.report, target.GPUS["h100"], 8, 1)
    assert bounds.network_hidden > bounds.network and bounds.network < 0.03 * bounds.seconds


def test_the_state_is_taken_over_whole(base_step):
    state = sum(size for part, size in base_step.arguments.items() if part != "batch")
    assert state == pytest.approx(16 * PARAMETERS, rel=1e-6)
    assert base_step.donated >= state
    assert sum(k.bytes for k in base_step.report.kernels if k.kind == "copy") < 1000  # and no array of it copied


def test_memory(base_step):
    assert base_step.peak < 3.0e9


def test_launches(base_step):
    """752 before norms, SwiGLU, cross-entropy, exchanges and the optimizer's norms were put together."""
    assert base_step.report.launches() <= 420


@pytest.mark.slow
def test_decoding_writes_into_its_cache():
    c = model_config()
    with target.compiling_for(target.GPUS["h100"]):
        loop = programs.decode_loop(c, target.devices(target.GPUS["h100"], 1)[0], batch=16)
    assert loop.donated >= loop.arguments["cache"] == 16 * 512 * 8 * 32 * 2 * 2 * 8
    layer = loop.arguments["cache"] / 16
    assert max(n_bytes(i.shape) for i in copies(loop)) < layer / 100
    assert loop.report.launches() <= 165 and len(loop.report.unknown_loops) == 1


def copies(program):
    computations, _ = parse(program.compiled.as_text())
    return [i for instructions in computations.values() for i in instructions if i.opcode.startswith("copy")]


# ---- other ways to run it ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_gradients_in_bfloat16_are_half_of_it():
    step = compile_step(base_config(grad_allreduce_dtype="bfloat16"))
    exchanges = gradient_exchanges(step)
    assert {c.dtypes for c in exchanges} == {("bf16",)} and all(c.is_async for c in exchanges)
    assert 2 * PARAMETERS <= sum(c.bytes for c in exchanges) <= 2.3 * PARAMETERS


@pytest.mark.slow
@pytest.mark.parametrize("remat, most, more", [("dots", 2.3e9, 1.06), ("full", 1.25e9, 1.27)])
def test_remat_saves_memory_for_arithmetic(base_step, remat, most, more):
    step = compile_step(base_config(remat=remat))
    assert step.peak < most
    assert base_step.report.flops() < step.report.flops() < more * base_step.report.flops()


@pytest.mark.slow
def test_deterministic_leaves_nothing_to_chance(base_step):
    """No scatter of atomic additions, and cuDNN is asked for its deterministic backward pass in every layer; without the first
    two conditions an H100 gave other bits from step 4 on. The price: one more product of the output layer's size.
    """
    program = compile_step(base_config(deterministic=True))
    text = program.compiled.as_text()
    assert " scatter(" in base_step.compiled.as_text() and " scatter(" not in text and " sort(" not in text
    assert text.count('"force_deterministic": true') == 8
    assert program.report.launches() <= 1.03 * base_step.report.launches()
    assert program.report.flops() <= 1.04 * base_step.report.flops()
    assert program.peak <= 1.05 * base_step.peak


@pytest.mark.slow
def test_fsdp_splits_the_state_and_exchanges_asynchronously(base_step):
    config = base_config()
    config.mesh.fsdp = 8
    step = compile_step(config)
    for part in ("parameters", "EMA", "optimizer"):
        assert step.arguments[part] < 1.01 * base_step.arguments[part] / 8
    exchanges = gradient_exchanges(step)
    assert {"all-gather", "reduce-scatter"} <= {c.opcode for c in exchanges} and all(c.is_async for c in exchanges)
    assert not any(c.opcode == "all-to-all" for c in step.report.collectives)
    assert sum(c.bytes for c in exchanges if c.opcode == "reduce-scatter") == pytest.approx(4 * PARAMETERS, rel=0.01)
    gathered = [c.bytes for c in exchanges if c.opcode == "all-gather" and c.dtypes == ("bf16",)]
    assert sum(gathered) == pytest.approx(2 * PARAMETERS / 8, rel=0.01)  # of its own part, once for both passes
    assert step.peak < 2.65e9
    # Gradients go out in parts while the backward pass goes on (mateconv_jax/runtime/xla_flags.py): without, they wait for 0.2 ms.
    assert roofline(step.report, target.GPUS["h100"], 8, 1).network < 0.1e-3


@pytest.mark.slow
def test_accumulated_micro_batches_are_exchanged_once(base_step):
    step = compile_step(base_config(accumulation_steps=4, batch_size=64))
    once = sum(c.times * c.bytes for c in gradient_exchanges(base_step))
    assert sum(c.times * c.bytes for c in gradient_exchanges(step)) == pytest.approx(once, rel=1e-3)
    assert step.report.flops() == pytest.approx(base_step.report.flops(), rel=1e-3)
    assert step.peak < base_step.peak / 2


@pytest.mark.slow
@pytest.mark.parametrize("gpu", [name for name in target.GPUS if name != "h100"])
def test_it_compiles_for_every_gpu(gpu):
    step = compile_step(base_config(model=dict(n_layers=1), batch_size=8), gpu, devices=2, hosts=2)
    assert [a.direction for a in step.report.attention] == ["forward", "backward"]
    assert set(step.report.matmuls_by_dtype()) <= {"bf16 x bf16 -> bf16", "bf16 x bf16 -> f32"}


@pytest.mark.slow
@pytest.mark.parametrize("gpu", ["a100", "h100", "4090"])
@pytest.mark.parametrize("head_dim, document_mask", [(64, True), (80, False), (96, False), (128, True)])
def test_long_rows_attend_in_fused_kernels(gpu, head_dim, document_mask):
    """As XLA compiles it: whether cuDNN takes the shape, only the GPU says."""
    shape = dict(n_layers=1, dim=4 * head_dim, n_heads=4, n_kv_heads=2, max_seq_len=16384)
    config = base_config(shape, batch_size=1, document_mask=document_mask)
    config.data.seq_len = 16384
    step = compile_step(config, gpu, devices=1)
    assert [a.direction for a in step.report.attention] == ["forward", "backward"]
