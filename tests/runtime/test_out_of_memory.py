import types

import jax
import pytest

from mateconv_jax import config as config_lib, evaluate, sample
from mateconv_jax.errors import UserError, exit_code
from mateconv_jax.inference import engine
from mateconv_jax.inference.text_generator import TextGenerator
from mateconv_jax.runtime import device_memory, out_of_memory
from mateconv_jax.serving import server
from mateconv_jax.training import checkpoints, loop
from tests.training.runs import steps_in, train

# What jax 0.11.2 raised on an H100 for 4,096 rows of the base model.
MESSAGE = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 276.17GiB. [tf-allocator-allocation-error='']"


def failing(message):
    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError(message)

    return fail


def test_out_of_memory_is_one_line_that_names_the_keys_to_lower(tiny_config, monkeypatch):
    monkeypatch.setattr(loop, "lower", failing(MESSAGE))
    with pytest.raises(UserError, match=r"training.batch_size: out of memory .*276.17GiB.*training.remat=full") as error:
        loop.train(config_lib.resolve(tiny_config))
    assert "\n" not in str(error.value)


def test_other_failures_of_the_device_stay_what_they_are(tiny_config, monkeypatch):
    monkeypatch.setattr(loop, "lower", failing("INTERNAL: an illegal memory access was encountered"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="illegal memory access"):
        loop.train(config_lib.resolve(tiny_config))


def test_what_cudnn_rejects_is_one_line(tiny_config, monkeypatch):
    def rejecting(*_):
        exec(compile("raise NotImplementedError('head dim 200')", "jax/_src/cudnn/fused_attention_stablehlo.py", "exec"))

    monkeypatch.setattr(loop, "lower", rejecting)
    with pytest.raises(UserError, match=r"model.attention: cuDNN rejects these shapes \(head dim 200; expected an even"):
        loop.train(config_lib.resolve(tiny_config))


@pytest.mark.slow
def test_samples_that_do_not_fit_have_their_own_advice(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.Samples, "write", failing(MESSAGE))
    with pytest.raises(UserError, match=r"training.sample_prompts: out of memory .*training.samples_interval=None"):
        train(tiny_config, tmp_path, max_steps=2, samples_interval=1)


def test_a_checkpoint_that_does_not_fit_is_not_taken_for_a_broken_one(tiny_config, tmp_path, monkeypatch):
    train(tiny_config, tmp_path / "out", max_steps=1)
    monkeypatch.setattr(checkpoints, "restore", failing(MESSAGE))
    for folder, options in (("out", {}), ("other", dict(resume_from=str(tmp_path / "out")))):
        with pytest.raises(UserError, match=r"mesh.fsdp: out of memory .*the training state alone does not fit"):
            train(tiny_config, tmp_path / folder, max_steps=2, **options)
    assert steps_in(tmp_path / "out") == [1] and not (tmp_path / "out" / "unreadable").exists()


def test_the_copy_for_a_checkpoint_that_does_not_fit_is_not_blamed_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints._Copies, "take", failing(MESSAGE))
    with pytest.raises(jax.errors.JaxRuntimeError), checkpoints.Checkpoints(tmp_path, 1, None, False) as saves:
        saves.save(1, {"w": jax.numpy.zeros(2)}, checkpoints.Progress())


@pytest.mark.parametrize("arguments, key", [(["--data", "x"], "--batch_size"), (["--demo"], "--batch_size")])
def test_evaluate_names_its_flags(monkeypatch, capsys, arguments, key):
    monkeypatch.setattr(TextGenerator, "from_pretrained", failing(MESSAGE))
    monkeypatch.setattr("mateconv_jax.evaluation.held_out.evaluate_run", failing(MESSAGE))
    assert exit_code(evaluate.main, evaluate.parse_args(["--model_path", "m", *arguments])) == 2
    assert capsys.readouterr().err.startswith(f"error: {key}: out of memory on cpu: 276.17GiB more requested")


def test_sample_names_its_flags(monkeypatch, capsys):
    monkeypatch.setattr(TextGenerator, "from_pretrained", failing(MESSAGE))
    assert exit_code(sample.main, sample.parse_args(["--model_path", "m", "--prompt", "x"])) == 2
    assert capsys.readouterr().err.startswith("error: --max_new_tokens: out of memory on cpu: 276.17GiB more requested")


def test_a_command_that_says_no_more_about_it(capsys):
    """As convert, which has no key to lower."""
    assert exit_code(lambda: jax.numpy.zeros(10**14).block_until_ready()) == 2  # bytes that no machine has
    assert capsys.readouterr().err.startswith("error: out of memory (Out of memory allocating 400000000000000 bytes")


def test_a_host_without_memory(capsys):
    def numpy():
        raise MemoryError("Unable to allocate 2 GiB for an array")

    assert exit_code(numpy) == 2
    assert capsys.readouterr().err == "error: out of memory (Unable to allocate 2 GiB for an array)\n"
    with pytest.raises(UserError, match="--batch_size: out of memory on this machine: 2 GiB more requested"):
        with out_of_memory.as_user_error("--batch_size", "lower it"):
            numpy()


def test_what_cannot_fit_is_said_before_the_first_step(monkeypatch):
    needed = types.SimpleNamespace(
        argument_size_in_bytes=int(3e9),
        output_size_in_bytes=int(2e9),
        alias_size_in_bytes=int(2e9),
        temp_size_in_bytes=int(5e9),
    )
    compiled = types.SimpleNamespace(memory_analysis=lambda: needed)
    out_of_memory.check(compiled, "key", "advice")  # the CPU does not say what there is
    for limit in (8e9, 7.9e9):
        monkeypatch.setattr(device_memory, "limit", lambda device, limit=limit: limit)
        if limit == 8e9:
            out_of_memory.check(compiled, "key", "advice")
    with pytest.raises(UserError, match=r"key: .* needs 8.0 GB, 3.0 of it for state and batch; 7.9 GB available .*\(advice\)"):
        out_of_memory.check(compiled, "key", "advice")


def test_a_server_without_room_says_so_and_ends(caplog):
    def start(progress):
        with out_of_memory.as_user_error(*engine.LOWER):
            failing(MESSAGE)()

    service = types.SimpleNamespace(engine=types.SimpleNamespace(start=start), status=types.SimpleNamespace(is_draining=False))
    uvicorn = types.SimpleNamespace(has_failed=False, should_exit=False)
    server._start_engine(service, uvicorn)
    assert uvicorn.has_failed and uvicorn.should_exit
    assert "cannot start: max_batch: out of memory on cpu: 276.17GiB more requested" in caplog.text
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize(
    "error, is_it",
    [
        (MemoryError(), True),
        (jax.errors.JaxRuntimeError(MESSAGE), True),
        (ValueError(f"saving failed: {MESSAGE}"), True),  # Orbax
        (ValueError("RESOURCE_EXHAUSTED: Error writing 'd/x' [os_error_code='28']"), False),  # TensorStore, of a full disk
        (jax.errors.JaxRuntimeError("INTERNAL: an illegal memory access"), False),
    ],
)
def test_a_full_disk_is_no_lack_of_memory(error, is_it, capsys):
    def fail():
        raise error

    if not is_it:
        with pytest.raises(type(error)):
            exit_code(fail)
    else:
        assert exit_code(fail) == 2 and capsys.readouterr().err.startswith("error: out of memory")
