"""The life of a training run, top to bottom."""

import functools
import math
from pathlib import Path

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from mateconv_jax import distributed, durations, run_folder, sharding
from mateconv_jax.data import dataset, input_pipeline, token_bytes, tokenizer as tokenizer_lib
from mateconv_jax.data.rows import FlatRows, Rows
from mateconv_jax.errors import UserError
from mateconv_jax.model import flops
from mateconv_jax.model.transformer import ModelConfig, abstract_model
from mateconv_jax.training import optimizer, resume, train_state
from mateconv_jax.training.checkpoints import Checkpoints
from mateconv_jax.training.metrics import BadStep, Metrics, logging_to
from mateconv_jax.training.signals import RESUMABLE, Signals
from mateconv_jax.training.step import LossOptions, make_eval_step, make_train_step


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


def _train(config: ConfigDict, signals: Signals) -> int:
    training = config.training

    # ---- where: devices, partition rules ----------------------------------------------------------------------------
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch_size(training.batch_size, mesh)
    model_config = ModelConfig.make(config.model, training.dtype)

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
    eval_interval, save_interval, log_interval = (
        durations.steps(training[key], total_steps, steps_per_epoch)
        for key in ("eval_interval", "save_interval", "log_interval")
    )
    schedule = optimizer.make_schedule(training, total_steps)
    tx = optimizer.make_optimizer(training, model_config)
    graph, abstract_params = abstract_model(model_config)
    loss_options = LossOptions(tokenizer.bos_token_id if training.document_mask else None, training.z_loss, training.remat)
    init = functools.partial(train_state.init, model_config, tx, training.seed, training.use_ema)
    abstract_state = sharding.with_shardings(mesh, jax.eval_shape(init))
    train_step = make_train_step(graph, tx, schedule, training, loss_options, abstract_state)
    eval_step = make_eval_step(graph, loss_options)

    # ---- from where: own run folder > resume_from > init_from > scratch ---------------------------------------------
    folder = Path(training.out_dir)
    differences = resume.check(folder, config)
    resume.make_folder(folder)
    with (
        logging_to(folder / "train.log"),
        Checkpoints(folder, training.keep_latest, training.keep_every, training.keep_best) as checkpoints,
    ):
        state, progress, source = resume.start(config, checkpoints, init, abstract_state)
        if distributed.is_first():
            run_folder.write_config(folder, config)
            tokenizer.save_pretrained(folder / "tokenizer")
        start_step = int(state.step)
        batches = input_pipeline.training_batches(
            train_rows, rows_per_step, training.seed, config.data.shuffle, start_step, config.data.num_workers
        )
        log_header(config, model_config, abstract_params, train_rows, total_steps, source)
        for difference in differences:
            logging.warning("not an exact continuation: %s", difference)
        if val_rows is None:
            logging.info("validation: none (there is no validation split and no data.val_data_path)")

        # ---- the loop -----------------------------------------------------------------------------------------------
        tokens_per_step = rows_per_step * config.data.seq_len
        peak = flops.peak_flops(jax.devices()[0].device_kind, model_config.dtype)
        mfu_per_token = (
            flops.training_flops_per_token(model_config, config.data.seq_len) / (peak * jax.device_count()) if peak else None
        )
        bytes_per_token_V = token_bytes.bytes_per_token(tokenizer)
        evaluated = progress.evaluated_step == start_step
        with Metrics(
            folder, start_step, evaluated, total_steps, tokens_per_step, log_interval, mfu_per_token, config.wandb
        ) as metrics:

            def evaluation_due(step: int) -> bool:
                regular = step % eval_interval == 0 or step == total_steps
                return val_rows is not None and step > 0 and regular and progress.evaluated_step != step

            def evaluate_and_keep_the_best(step: int) -> None:
                with metrics.not_training():
                    losses = evaluate(
                        eval_step, state, val_rows, training, mesh, bytes_per_token_V, signals if step < total_steps else None
                    )
                    if losses is None:  # asked to stop: it is done when the run goes on
                        return
                    metrics.write(step, losses)
                    if progress.evaluated(step, losses.get("val/ema_loss", losses["val/loss"])):
                        checkpoints.save_best(step, state, progress)

            def check_gradients(bad_step: BadStep | None, step: int) -> None:
                if bad_step is None:
                    return
                place = np.arange((bad_step.step - 1) * rows_per_step, bad_step.step * rows_per_step)
                rows = input_pipeline.row_numbers(place, len(train_rows), training.seed) if config.data.shuffle else place
                logging.warning(
                    "step %d: the gradient is not finite, the update is left out (%d in a row); rows %s; largest norms: %s",
                    bad_step.step, bad_step.in_a_row, (rows % len(train_rows)).tolist(), bad_step.largest(),
                )  # fmt: skip
                if bad_step.in_a_row >= training.max_bad_steps:
                    checkpoints.save(step, state, progress)
                    raise UserError(
                        f"training.max_bad_steps: {bad_step.in_a_row} steps in a row had a gradient that is not finite; the "
                        f"parameters of step {bad_step.step - bad_step.in_a_row} are kept, in the checkpoint of step {step} "
                        "(expected a lower training.learning_rate, a longer warm-up, or other data)"
                    )

            step = start_step
            if evaluation_due(step):  # the run was stopped in its middle
                evaluate_and_keep_the_best(step)
            done = step >= total_steps or training.early_stopping and progress.bad_evaluations >= training.patience
            if done:
                logging.info("nothing to do: step %d of %d is in %s", step, total_steps, folder)
            while not (done or signals.poll(step)):
                step += 1
                batch = input_pipeline.micro_batches(next(batches), training.accumulation_steps)
                state, step_metrics = train_step(state, to_devices(batch, mesh))  # dispatched, not waited for
                check_gradients(metrics.push(step, step_metrics), step)  # reads the step before while this one runs

                last = step == total_steps
                if evaluation_due(step):
                    check_gradients(metrics.flush(), step)
                    evaluate_and_keep_the_best(step)
                    if training.early_stopping and progress.bad_evaluations >= training.patience:
                        logging.info(
                            "early stopping: no lower loss than %.4f, of step %d, in %d evaluations",
                            progress.best_loss, progress.best_step, progress.bad_evaluations,
                        )  # fmt: skip
                        last = True
                if step % save_interval == 0 or last:
                    check_gradients(metrics.flush(), step)
                    with metrics.not_training():
                        checkpoints.save(step, state, progress)
                done = last
            if not done:
                check_gradients(metrics.flush(), step)
                checkpoints.save(step, state, progress)
                logging.info("stopped at step %d of %d; the same command goes on from there", step, total_steps)
    return 0 if done else RESUMABLE


def evaluate(
    eval_step, state: train_state.TrainState, rows: Rows, training: ConfigDict, mesh, bytes_per_token_V, signals: Signals | None
) -> dict[str, float] | None:
    """Mean cross-entropy in nats over the first eval_iters batches: val/loss, and val/ema_loss when EMA is on; and
    val/bits_per_byte of the text, of the EMA when it is on. None where one of `signals` came before the end.
    """
    weights = {"val/loss": state.params}
    if state.ema_params is not None:
        weights["val/ema_loss"] = state.ema_params
    sums = {name: [] for name in weights}
    n_bytes = 0
    for batch in input_pipeline.validation_batches(rows, training.batch_size, training.eval_iters):
        if signals is not None and signals.stop:
            return None
        n_bytes += token_bytes.target_bytes(bytes_per_token_V, batch)
        on_devices = to_devices(batch, mesh)
        for name, params in weights.items():
            sums[name].append(eval_step(params, on_devices))
    scalars = {}
    for name, pairs in jax.device_get(sums).items():
        loss_sum, count = np.sum(np.asarray(pairs, np.float64), axis=0)
        scalars[name] = float(loss_sum / count)
    loss = scalars.get("val/ema_loss", scalars["val/loss"])
    n_bytes = np.sum(multihost_utils.process_allgather(np.int64(n_bytes)))  # each process read its rows
    if n_bytes:
        scalars["val/bits_per_byte"] = float(loss * count / math.log(2) / n_bytes)
    return scalars


def to_devices(batch: input_pipeline.Batch, mesh) -> dict[str, jax.Array]:
    """This process's rows as part of the global batch: `length` (B,) or, of several micro-batches, (A, B)."""
    rows_axis = batch["length"].ndim - 1
    spread = functools.partial(jax.make_array_from_process_local_data, sharding.batch(mesh, rows_axis))
    return {key: spread(value) for key, value in batch.items()}


def open_data(config: ConfigDict):
    """Training rows, validation rows (None: there are none) and tokenizer, once they are known to fit each other and the model.

    Raises:
      UserError: they do not; the message names the key.
    """
    data = config.data
    if data.train_data_path is None:
        raise UserError(
            "data.train_data_path: missing (expected a folder made by python -m mateconv_jax.prepare, or a .bin file)"
        )
    paths = {"data.train_data_path": data.train_data_path, "data.val_data_path": data.val_data_path}
    if data.tokenizer_path is None and data.train_data_path.endswith(".bin"):
        raise UserError(
            f"data.tokenizer_path: missing (expected the tokenizer of {data.train_data_path!r}, which holds only ids)"
        )
    tokenizer = tokenizer_lib.load(data.tokenizer_path, "data.tokenizer_path") if data.tokenizer_path else None
    for key, path in paths.items():
        if path is None or path.endswith(".bin"):
            continue
        metadata = dataset.read_metadata(path, key)
        if metadata["seq_len"] != data.seq_len:
            raise UserError(
                f"data.seq_len: {data.seq_len}, but {path!r} has rows of {metadata['seq_len']} tokens (set it to that)"
            )
        if tokenizer is None:
            tokenizer = tokenizer_lib.load(Path(path) / "tokenizer", key)
        if tokenizer_lib.fingerprint(tokenizer) != metadata["tokenizer_fingerprint"]:
            raise UserError(
                f"{key}: {path!r} was tokenised with another tokenizer than the run's (prepare it with the same one)"
            )
    if len(tokenizer) > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size: {config.model.vocab_size} is smaller than the tokenizer's vocabulary "
            f"(expected at least {len(tokenizer)})"
        )
    train_rows = dataset.open_rows(data.train_data_path, "train", data.seq_len, "data.train_data_path")
    if data.val_data_path is not None:
        val_rows = dataset.open_rows(data.val_data_path, "validation", data.seq_len, "data.val_data_path")
    elif data.train_data_path.endswith(".bin"):
        val_rows = None
    else:
        val_rows = dataset.open_rows(data.train_data_path, "validation", data.seq_len, "data.train_data_path")
    for (key, path), rows in zip(paths.items(), (train_rows, val_rows), strict=True):
        # A folder's ids are known to fit. Out of range, an id would silently take the last row of the embedding.
        if isinstance(rows, FlatRows) and (largest := rows.largest_token()) >= config.model.vocab_size:
            raise UserError(f"{key}: {path!r} has the token id {largest} (model.vocab_size is {config.model.vocab_size})")
    return train_rows, val_rows, tokenizer


def log_header(config: ConfigDict, c: ModelConfig, abstract_params, rows: Rows, total_steps: int, source: str):
    """What is about to happen."""
    training, device = config.training, jax.devices()[0]
    n_params = sum(p.size for p in jax.tree.leaves(abstract_params))
    rows_per_step = training.batch_size * training.accumulation_steps
    logging.info("model: %s parameters, computed in %s, %s attention", f"{n_params:,}", c.dtype.name, c.attention)
    logging.info(
        "devices: %d x %s, %d rows each", jax.device_count(), device.device_kind, training.batch_size // jax.device_count()
    )
    logging.info(
        "data: %s rows of %d tokens, %.2f epochs in %s steps of %s tokens",
        f"{len(rows):,}", config.data.seq_len, total_steps * rows_per_step / len(rows), f"{total_steps:,}",
        f"{rows_per_step * config.data.seq_len:,}",
    )  # fmt: skip
    per_token = flops.training_flops_per_token(c, config.data.seq_len)
    peak = flops.peak_flops(device.device_kind, c.dtype)
    logging.info(
        "arithmetic: %.3g FLOPs a token, %.3g in all; a device's peak is %s",
        per_token, per_token * total_steps * rows_per_step * config.data.seq_len, f"{peak:.3g} FLOP/s" if peak else "unknown",
    )  # fmt: skip
    logging.info("start: %s", source)
    if source == resume.FROM_SCRATCH:
        vocab_size = config.model.vocab_size
        logging.info(
            "expected initial loss: ln(%s) = %.4f (a model that knows nothing)", f"{vocab_size:,}", math.log(vocab_size)
        )
