"""The life of a training run, top to bottom."""

import functools
import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mateconv_jax import intervals, run_folder
from mateconv_jax.data import loader
from mateconv_jax.data.dataset import Rows
from mateconv_jax.data.tokenizer import token_bytes
from mateconv_jax.errors import UserError
from mateconv_jax.losses.next_token import next_token_loss
from mateconv_jax.model import flops
from mateconv_jax.model.config import ModelConfig
from mateconv_jax.model.transformer import abstract_model
from mateconv_jax.runtime import distributed, sharding
from mateconv_jax.training import optimizer, out_of_memory, resume, train_state
from mateconv_jax.training.checkpoints import Checkpoints
from mateconv_jax.training.header import log_header, log_memory
from mateconv_jax.training.logging_setup import logging_to
from mateconv_jax.training.metrics import BadStep, Metrics
from mateconv_jax.training.open_data import open_data
from mateconv_jax.training.preemption import RESUMABLE, Signals
from mateconv_jax.training.samples import Samples
from mateconv_jax.training.step import lower, make_eval_step, make_train_step
from mateconv_jax.training.validation import evaluate


def train(config: ConfigDict) -> int:
    """Train as `config` (resolved) says.

    Returns:
      0, or signals.RESUMABLE where SIGTERM or SIGINT ended it early; a checkpoint of that step is finished then.

    Raises:
      UserError: a path, a size or an option that does not fit; the message names the key. Nothing was written then. Or a
        file that cannot be read or written; or gradients that are not finite for training.max_bad_steps.
    """
    try:
        with Signals() as signals:
            return _train(config, signals)
    except OSError as error:  # the log, the metrics
        raise UserError(
            f"training.out_dir: cannot write {error.filename or config.training.out_dir!r}: {error.strerror or error} "
            "(finished checkpoints stay, and the same command goes on from the newest)"
        ) from error
    except jax.errors.JaxRuntimeError as error:
        if not out_of_memory.is_cause_of(error):
            raise
        raise UserError(out_of_memory.explain(error)) from error


def _train(config: ConfigDict, signals: Signals) -> int:
    training = config.training

    # ---- where: devices, partition rules ----------------------------------------------------------------------------
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch_size(training.batch_size, mesh)
    model_config = ModelConfig.make(config.model, training.dtype, length=config.data.seq_len)

    # ---- what: data, model, optimizer -------------------------------------------------------------------------------
    train_rows, val_rows, tokenizer = open_data(config)
    rows_per_step = training.batch_size * training.accumulation_steps
    steps_per_epoch = len(train_rows) / rows_per_step
    total_steps = training.max_steps or math.floor(training.epochs * steps_per_epoch)
    if total_steps == 0:
        raise UserError(
            f"training.batch_size: {rows_per_step} rows of a step are more than the dataset's {len(train_rows)} rows x "
            f"{training.epochs} epochs (expected a smaller batch or more epochs)"
        )
    eval_interval, save_interval, log_interval, samples_interval = (
        intervals.steps(training[key], total_steps, steps_per_epoch) if training[key] is not None else None
        for key in ("eval_interval", "save_interval", "log_interval", "samples_interval")
    )
    schedule = optimizer.make_schedule(training, total_steps)
    tx = optimizer.make_optimizer(training, model_config)
    graph, abstract_params = abstract_model(model_config)
    loss_fn = functools.partial(next_token_loss, z_loss=training.z_loss, remat=training.remat)
    init = functools.partial(train_state.init, model_config, tx, training.seed, training.use_ema)
    abstract_state = sharding.with_shardings(mesh, jax.eval_shape(init))
    train_step = make_train_step(graph, loss_fn, tx, schedule, training, abstract_state)
    eval_step = make_eval_step(graph, loss_fn)
    samples = samples_interval and Samples(graph, abstract_params, tokenizer, training.sample_prompts, mesh)
    flops_per_token = flops.training_flops_per_token(model_config, config.data.seq_len)
    peak_flops = flops.peak_flops(jax.devices()[0].device_kind, model_config.dtype)

    # ---- from where: own run folder > resume_from > init_from > scratch ---------------------------------------------
    folder = Path(training.out_dir)
    differences = resume.check(folder, config, tokenizer)
    resume.make_folder(folder)
    with (
        logging_to(folder / "train.log"),
        Checkpoints(folder, training.keep_latest, training.keep_every, training.keep_best) as checkpoints,
    ):
        state, progress, source = resume.start(config, checkpoints, init, abstract_state)
        if distributed.is_first():
            run_folder.write_config(folder, config)
            tokenizer.save_pretrained(folder / "tokenizer")
            run_folder.keep_data_statistics(folder, config.data.train_data_path)
        start_step = int(state.step)
        batches = training_batches(config, train_rows, start_step, mesh)
        log_header(config, model_config, abstract_params, train_rows, total_steps, flops_per_token, peak_flops, source)
        for difference in differences:
            logging.warning("not an exact continuation: %s", difference)
        if val_rows is None:
            logging.info("validation: none (there is no validation split and no data.val_data_path)")

        # ---- the loop -----------------------------------------------------------------------------------------------
        tokens_per_step = rows_per_step * config.data.seq_len
        mfu_per_token = flops_per_token / (peak_flops * jax.device_count()) if peak_flops else None
        bytes_per_token_V = token_bytes.bytes_per_token(tokenizer)
        evaluated = progress.evaluated_step == start_step
        paths = jax.tree.leaves_with_path(abstract_params)
        leaf_names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]
        with Metrics(
            folder, leaf_names, start_step, evaluated, total_steps, tokens_per_step, log_interval, mfu_per_token, config.wandb,
            training.profile_step,
        ) as metrics:  # fmt: skip

            def evaluation_due(step: int) -> bool:
                regular = step % eval_interval == 0 or step == total_steps
                return val_rows is not None and step > 0 and regular and progress.evaluated_step != step

            def evaluate_and_keep_the_best(step: int) -> None:
                with metrics.not_training():
                    losses = evaluate(
                        eval_step, state, val_rows, training.batch_size, training.eval_iters, mesh, bytes_per_token_V,
                        signals if step < total_steps else None,
                    )  # fmt: skip
                    if losses is None:  # asked to stop: it is done when the run goes on
                        return
                    metrics.write(step, losses)
                    if progress.evaluated(step, losses.get("val/ema_loss", losses["val/loss"])):
                        checkpoints.save_best(step, state, progress)

            def write_samples(step: int) -> None:
                with metrics.not_training():
                    params = state.params if state.ema_params is None else state.ema_params
                    metrics.write_samples(step, samples.write(params))

            def check_step(bad_step: BadStep | None, step: int) -> None:
                if bad_step is None:
                    return
                places = np.arange((bad_step.step - 1) * rows_per_step, bad_step.step * rows_per_step)
                rows = loader.rows_at(places, len(train_rows), training.seed, config.data.shuffle)
                logging.warning(
                    "step %d: %s, the update is left out (%d in a row); rows %s; largest norms: %s",
                    bad_step.step, bad_step.reason(), bad_step.in_a_row, rows.tolist(), bad_step.largest(),
                )  # fmt: skip
                if bad_step.in_a_row >= training.max_bad_steps:
                    checkpoints.save(step, state, progress)
                    raise UserError(
                        f"training.max_bad_steps: {bad_step.in_a_row} steps in a row were left out, the last because "
                        f"{bad_step.reason()}; the parameters of step {bad_step.step - bad_step.in_a_row} are kept, in the "
                        f"checkpoint of step {step} (expected a lower training.learning_rate, a longer warm-up, or other data)"
                    )

            step = start_step
            if evaluation_due(step):  # the run was stopped in its middle
                evaluate_and_keep_the_best(step)
            done = step >= total_steps or training.early_stopping and progress.bad_evaluations >= training.patience
            if done:
                logging.info("nothing to do: step %d of %d is in %s", step, total_steps, folder)
            else:
                first = next(batches)
                train_step = compile_step(train_step, state, first, training)
                batches = itertools.chain([first], batches)
            while not (done or signals.poll(step)):
                step += 1
                with metrics.waiting_for_input():
                    batch = next(batches)
                state, step_metrics = train_step(state, batch)  # dispatched, not waited for
                check_step(metrics.push(step, step_metrics), step)  # reads the step before while this one runs

                last = step == total_steps
                if evaluation_due(step):
                    check_step(metrics.flush(), step)
                    evaluate_and_keep_the_best(step)
                    if training.early_stopping and progress.bad_evaluations >= training.patience:
                        logging.info(
                            "early stopping: no lower loss than %.4f, of step %d, in %d evaluations",
                            progress.best_loss, progress.best_step, progress.bad_evaluations,
                        )  # fmt: skip
                        last = True
                if samples and (step % samples_interval == 0 or last):
                    check_step(metrics.flush(), step)
                    write_samples(step)
                if step % save_interval == 0 or last:
                    check_step(metrics.flush(), step)
                    with metrics.not_training():
                        checkpoints.save(step, state, progress)
                done = last
            if not done:
                check_step(metrics.flush(), step)
                checkpoints.save(step, state, progress)
                logging.info("stopped at step %d of %d; the same command goes on from there", step, total_steps)
    return 0 if done else RESUMABLE


def training_batches(config: ConfigDict, rows: Rows, start_step: int, mesh: Mesh) -> Iterator[dict[str, jax.Array]]:
    """What the steps from `start_step` on read, on the devices: tokens (A, B, S + 1) and length (A, B)."""
    training = config.training
    rows_per_step = training.batch_size * training.accumulation_steps
    for batch in loader.training_batches(
        rows, rows_per_step, training.seed, config.data.shuffle, start_step, config.data.num_workers
    ):
        yield sharding.to_devices(loader.micro_batches(batch, training.accumulation_steps), mesh, rows_axis=1)


def compile_step(train_step, state: train_state.TrainState, batch, training: ConfigDict) -> jax.stages.Compiled:
    """Ahead of the loop, so that its memory is known before the first step and nothing can compile in the loop: arrays of
    other shapes are an error.
    """
    compiled = lower(train_step, state, batch, training).compile()
    log_memory(compiled)
    return compiled
