"""A training run from top to bottom."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
from absl import logging
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerFast

from mateconv_jax import config as config_lib, disk, run_folder
from mateconv_jax.data import mixture
from mateconv_jax.data.dataset import Rows, fingerprint
from mateconv_jax.errors import UserError
from mateconv_jax.interop.stored_model import write_end_ids
from mateconv_jax.model import flops
from mateconv_jax.model.attention import cudnn
from mateconv_jax.model.config import ModelConfig
from mateconv_jax.runtime import agreement, distributed, out_of_memory, sharding
from mateconv_jax.runtime.notices import Notices
from mateconv_jax.training import mixing, objective as objective_lib, reinforcement, resume, run_lock, setup
from mateconv_jax.training.batch_shape import BatchShape
from mateconv_jax.training.batches import Source
from mateconv_jax.training.best_metric import BestMetric
from mateconv_jax.training.checkpoints import Checkpoints, Progress
from mateconv_jax.training.evaluator import Evaluation
from mateconv_jax.training.hang_watch import HangWatch
from mateconv_jax.training.header import log_header, log_memory
from mateconv_jax.training.logging_setup import logging_to
from mateconv_jax.training.metrics import Metrics
from mateconv_jax.training.open_data import DataOptions, open_data, open_prompts
from mateconv_jax.training.preemption import RESUMABLE, Signals
from mateconv_jax.training.reference import Reference
from mateconv_jax.training.same_inputs import check_same_config, check_same_data
from mateconv_jax.training.samples import Samples
from mateconv_jax.training.setup import Length
from mateconv_jax.training.skipped_steps import SkippedSteps
from mateconv_jax.training.step import lower, make_score_step
from mateconv_jax.training.task_evaluator import TaskEvaluator
from mateconv_jax.training.time_limit import SaveTimer, TimeLimit
from mateconv_jax.training.train_state import TrainState
from mateconv_jax.training.writers import WandbOptions

# What to do about too little memory: the key that decides most, and advice. Narrower blocks have their own.
LOWER = (
    "training.batch_size",
    "lower it and raise training.accumulation_steps, or set training.remat=full, or with several GPUs mesh.fsdp; "
    "`python -m mateconv_jax.plan --gpu=this` shows what fits",
)


def train(config: ConfigDict, signals: Signals | None = None) -> int:
    """Train as `config` (resolved) says.

    Returns:
      0, or preemption.RESUMABLE if SIGTERM, SIGINT or training.max_hours ended it early, with a finished checkpoint.

    Raises:
      UserError: another process trains in the same folder; a path, a size or an option that does not fit, before anything is
        written; a file that cannot be read or written; out of memory; training.max_bad_steps skipped updates in a row.
    """
    time_limit, notices, out_dir = TimeLimit(config.training.max_hours), Notices(), Path(config.training.out_dir).absolute()
    with Signals() if signals is None else contextlib.nullcontext(signals) as signals:
        signals.connect(notices, jax.process_count(), time_limit)
        with notices, _clear_errors(out_dir), disk.os_errors(out_dir), out_of_memory.as_user_error(*LOWER):
            check_same_config(config)
            with run_lock.held(out_dir), HangWatch(config.training.hang_timeout) as watch:
                return _train(config, signals, notices, time_limit, watch)


@contextlib.contextmanager
def _clear_errors(out_dir: Path):
    """Turns an OSError, of writing the log and the metrics if it names no other file, into a UserError."""
    try:
        yield
    except OSError as error:
        filename = out_dir if error.filename is None else Path(os.fsdecode(error.filename))
        if not filename.absolute().is_relative_to(out_dir):
            raise UserError(f"{filename}: {error.strerror or error}") from error
        raise UserError(
            f"training.out_dir: cannot write {str(filename)!r}: {error.strerror or error} "
            "(finished checkpoints stay; the same command continues from the newest)"
        ) from error


def _train(config: ConfigDict, signals: Signals, notices: Notices, time_limit: TimeLimit, watch: HangWatch) -> int:
    training = config.training

    # ---- from where: see resume.find_origin -------------------------------------------------------------------------
    origin = resume.find_origin(config)
    config, shape_taken = resume.with_model_of(origin, config)

    # ---- where: devices and mesh ------------------------------------------------------------------------------------
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    sharding.check_batch_size(training.batch_size, mesh)
    c = setup.model_config(config)

    # ---- what: data, model, optimizer, loss -------------------------------------------------------------------------
    objective = objective_lib.of(config)
    objective.check_origin(origin.key)
    train_rows, val_sets, tokenizer = _open(config, c, objective, origin)
    position = resume.position(origin)
    length = Length.of(training, len(train_rows), position)
    programs = setup.build(config, c, mesh, length.total_steps, objective)
    samples = _samples(objective, length, programs, tokenizer, training)
    tasks = TaskEvaluator.of(config, programs.graph, programs.abstract_params, c, mesh, tokenizer)
    best = _best_metric(training, objective, val_sets, tasks)

    # ---- the run folder ---------------------------------------------------------------------------------------------
    folder = Path(training.out_dir)
    differences = resume.check_compatible(origin, config, tokenizer)
    if training.keep_best:
        resume.bring_best(origin, folder)
    with logging_to(folder / "train.log"), _checkpoints(training, folder, time_limit, notices) as checkpoints:
        state, progress, read, start = resume.start(origin, checkpoints, programs.init, programs.abstract_state)
        if read != position:  # the newest checkpoint was damaged
            length = Length.of(training, len(train_rows), read)
            programs = setup.build(config, c, mesh, length.total_steps, objective)
        order, mixed = mixing.order_of(train_rows, Path(config.data.train_data_path).name, progress)
        differences += mixed + progress.reads(*_fingerprints(train_rows, val_sets, training, tasks))
        end_ids = resume.end_ids(origin, c.vocab_size)
        if distributed.is_first():
            _describe(folder, config, tokenizer, end_ids)
        _log_choices(shape_taken, tasks, best)
        log_header(programs, train_rows, order, val_sets, objective, length.total_steps, read, start, differences)

        # ---- the reference, batches, validation ---------------------------------------------------------------------
        if objective.needs_reference:
            reference = _reference(config, programs, origin, folder)
            if (joined := reference.join(train_rows, val_sets, state.params, progress, signals.poll)) is None:
                return RESUMABLE
            train_rows, val_sets = joined
        context = objective_lib.Context(folder, end_ids, progress, signals.poll, order)
        source = objective.source(c, mesh, train_rows, tokenizer, read, context)
        if length.samples_interval is not None and objective.samples is not None:
            samples = objective.samples(source)
        evaluator_of = functools.partial(objective.evaluator, c, mesh, programs.eval_step)
        evaluators = {name: evaluator_of(rows, tokenizer, context) for name, rows in val_sets.items()}
        with _metrics(config, programs, objective.shape, length, int(state.step), progress) as metrics:
            return Run(
                folder, length, programs, source, evaluators, tasks, best, samples, checkpoints,
                SaveTimer(training.save_minutes), metrics, signals, watch, training.max_bad_steps,
                training.patience if training.early_stopping else None,
            ).steps(state, progress)  # fmt: skip


def _checkpoints(training: ConfigDict, folder: Path, time_limit: TimeLimit, notices: Notices) -> Checkpoints:
    keep = training.keep_latest, training.keep_every, training.keep_best
    return Checkpoints(folder, *keep, on_written=time_limit.saved_in, on_failed=notices.fail)


def _open(config: ConfigDict, c: ModelConfig, objective: objective_lib.Objective, origin: resume.Origin):
    """Training rows, validation rows by the name of their set, and tokenizer."""
    options = config_lib.options(DataOptions, config.data)
    if objective.content == "prompts":
        longest, rows_per_prompt = reinforcement.longest_prompt(config), config.rollout.samples * config.rollout.iterations
        opened = open_prompts(options, c.vocab_size, longest, rows_per_prompt, origin.tokenizer)
    else:
        opened = open_data(options, c.vocab_size, config.training.document_mask, objective.check)
    if config.training.early_stopping and not opened[1] and config.training.best_metric is None:
        raise UserError("training.early_stopping: there are no validation rows (expected data.val_data_path)")
    return opened


def _best_metric(
    training: ConfigDict, objective: objective_lib.Objective, val_sets: Mapping[str, Rows], tasks: TaskEvaluator | None
) -> BestMetric:
    best = BestMetric(training.best_metric)
    of_loss = ["loss", "bits_per_byte", *["ema_loss"] * training.use_ema] if objective.kind == "next_token" else None
    best.check(val_sets, tasks.metric_names if tasks else [], of_loss)
    return best


def _log_choices(shape_taken: str | None, tasks: TaskEvaluator | None, best: BestMetric) -> None:
    """What the run takes from others, what it is asked, and what counts as best."""
    if shape_taken:
        logging.info("%s", shape_taken)
    if tasks is not None:
        tasks.log()
    if best.name is not None:
        logging.info("best checkpoint: the one with the %s %s", "highest" if best.shall_be_high else "lowest", best.name)


def _describe(folder: Path, config: ConfigDict, tokenizer: PreTrainedTokenizerFast, end_ids: tuple[int, ...]) -> None:
    """Write into the run folder what makes it usable wherever it is moved."""
    run_folder.write_config(folder, config)
    tokenizer.save_pretrained(folder / "tokenizer")
    if end_ids:
        write_end_ids(folder, end_ids)
    run_folder.keep_data_statistics(folder, config.data.train_data_path)


@dataclasses.dataclass
class Run:
    """What the loop works with.

    Attributes:
      source: see batches.py.
      evaluators: {name of the validation set: see Evaluator}.
      tasks: None: the run asks no benchmark questions.
      best: what decides which checkpoint is the best.
      samples: None: the run writes none.
      patience: evaluations without a new best after which it stops early; None: never.
      evaluated: in this process, whether on rows and whether on benchmark questions.
    """

    folder: Path
    length: Length
    programs: setup.Setup
    source: Source
    evaluators: dict[str, Callable[..., Evaluation | None]]
    tasks: TaskEvaluator | None
    best: BestMetric
    samples: Samples | None
    checkpoints: Checkpoints
    save_timer: SaveTimer
    metrics: Metrics
    signals: Signals
    watch: HangWatch
    max_bad_steps: int
    patience: int | None
    evaluated: set[tuple[bool, bool]] = dataclasses.field(default_factory=set)

    def steps(self, state: TrainState, progress: Progress) -> int:
        """From the state's step to the end, or until the run is asked to stop. Returns the exit code."""
        length, metrics, step = self.length, self.metrics, int(state.step)
        skipped = SkippedSteps(self.source.describe, self.max_bad_steps)

        def save():
            with self.watch.paused():
                self.checkpoints.save(step, state, progress)
            self.save_timer.restart()

        if self.evaluation_due(step, progress):  # the run was stopped during it
            self.evaluate(step, state, progress)
        done = step >= length.total_steps or self.out_of_patience(progress)
        if done:
            logging.info("nothing to do: %s is at step %d of %d", self.folder, step, length.total_steps)
            return 0
        if (batch := self.source(step, state.params)) is None:  # asked to stop while it was made
            return self.stopped(step)
        train_step = compile_step(self.programs, state, batch, self.checkpoints)

        while not (done or self.signals.poll_step()):
            with metrics.waiting_for_input():
                batch = self.source(step, state.params)
            if batch is None:
                break
            of_batch = self.source.metrics(step)
            step += 1
            progress.rows = self.source.rows_before(step)
            state, step_metrics = train_step(state, batch)  # dispatched, not waited for
            skipped.check(metrics.push(step, step_metrics | of_batch), step, save)  # reads the previous one's meanwhile
            self.watch.progress()

            done = step == length.total_steps
            if self.evaluation_due(step, progress):
                skipped.check(metrics.flush(), step, save)
                self.evaluate(step, state, progress)
                done = done or self.stops_early(progress)
            if (every := length.samples_interval) is not None and (step % every == 0 or done):
                skipped.check(metrics.flush(), step, save)
                self.write_samples(step, state)
            if step % length.save_interval == 0 or done or self.save_timer.is_due(step):
                skipped.check(metrics.flush(), step, save)
                with metrics.not_training():
                    save()
        if done:
            return 0
        skipped.check(metrics.flush(), step, save)
        save()
        return self.stopped(step)

    def stopped(self, step: int) -> int:
        """The exit code."""
        logging.info("stopped at step %d of %d; the same command continues from there", step, self.length.total_steps)
        return RESUMABLE

    # ---- what happens every so often --------------------------------------------------------------------------------

    def evaluation_due(self, step: int, progress: Progress) -> bool:
        of_rows, of_tasks = self.due(step)
        return (of_rows or of_tasks) and step > 0 and progress.evaluated_step != step

    def due(self, step: int) -> tuple[bool, bool]:
        """Whether the validation rows, and the benchmark questions, have their turn."""
        last = step == self.length.total_steps
        of_rows = bool(self.evaluators) and (last or step % self.length.eval_interval == 0)
        return of_rows, self.tasks is not None and (last or step % self.length.tasks_interval == 0)

    def evaluate(self, step: int, state: TrainState, progress: Progress) -> None:
        """Write validation loss and benchmark scores, and keep the best checkpoint. When the run is asked to stop, its
        resumption does this.
        """
        last = step == self.length.total_steps

        def should_stop() -> bool:
            self.watch.progress()
            return self.signals.poll() and not last

        of_rows, of_tasks = self.due(step)
        # The first time it is compiled, and the first process writes answers alone: nobody knows how long that takes.
        pauses = (of_rows, of_tasks) not in self.evaluated or self.tasks is not None and self.tasks.writes_answers
        with self.metrics.not_training(), self.watch.paused() if pauses else contextlib.nullcontext():
            losses = validation_losses(self.evaluators, state, should_stop) if of_rows else {}
            if losses is not None and of_tasks and self.tasks is not None:
                params = state.params if state.ema_params is None else state.ema_params
                scores = self.tasks(params, should_stop)
                losses = None if scores is None else losses | scores
            # All processes have summed the same numbers, but best and patience must not hang on that.
            losses = agreement.from_first("losses", losses)
            self.evaluated.add((of_rows, of_tasks))
            if losses is None:
                return
            self.metrics.write(step, losses)
            progress.evaluated_step, value = step, self.best.value(losses)
            if value is not None and progress.evaluated(step, value, self.best.shall_be_high):
                with self.watch.paused():
                    self.checkpoints.save_best(step, state, progress)

    def out_of_patience(self, progress: Progress) -> bool:
        return self.patience is not None and progress.bad_evaluations >= self.patience

    def stops_early(self, progress: Progress) -> bool:
        if self.out_of_patience(progress):
            best = "" if progress.best_loss is None else f" than {progress.best_loss:.4f}, of step {progress.best_step}"
            logging.info("early stopping: %d evaluations without %s%s", progress.bad_evaluations, self.best.words, best)
        return self.out_of_patience(progress)

    def write_samples(self, step: int, state: TrainState) -> None:
        assert self.samples is not None  # samples_interval is given
        with self.metrics.not_training(), self.watch.paused():
            params = state.params if state.ema_params is None else state.ema_params
            with out_of_memory.as_user_error("training.sample_prompts", "fewer, or training.samples_interval=None"):
                self.metrics.write_samples(step, self.samples.write(params))


def validation_losses(
    evaluators: dict[str, Callable[..., Evaluation | None]], state: TrainState, should_stop: Callable[[], bool]
) -> dict[str, float] | None:
    """val/loss and, with EMA, val/ema_loss; and, of the EMA if there is one, val/bits_per_byte and the metrics of the loss.
    These are of the first set; every set with a name has them as val/NAME/loss and so on. None if `should_stop` became true
    before the end.
    """
    losses = {}
    for name, evaluator in evaluators.items():
        of_set = _losses_of_set(evaluator, state, should_stop)
        if of_set is None:
            return None
        if not losses:
            losses |= {f"val/{metric}": value for metric, value in of_set.items()}
        if name:
            losses |= {f"val/{name}/{metric}": value for metric, value in of_set.items()}
    return losses


def _losses_of_set(evaluator: Callable[..., Evaluation | None], state: TrainState, should_stop) -> dict[str, float] | None:
    weights = {"loss": state.params}
    if state.ema_params is not None:
        weights["ema_loss"] = state.ema_params
    result = evaluator(weights, should_stop)
    if result is None:
        return None
    losses = {name: result.loss(name) for name in weights}
    last = list(weights)[-1]
    if result.bytes:
        losses["bits_per_byte"] = result.bits_per_byte(last)
    return losses | {metric.rpartition("/")[2]: value for metric, value in result.metrics(last).items()}


def _fingerprints(
    train_rows: Rows, val_sets: Mapping[str, Rows], training: ConfigDict, tasks: TaskEvaluator | None = None
) -> tuple[str, str | None]:
    """Of the training rows, and of what decides what is best is measured on: the first validation set, or what
    training.best_metric names.
    """
    mixed = isinstance(train_rows, mixture.MixedRows)
    train = mixture.fingerprint(train_rows.parts) if mixed else fingerprint(train_rows, len(train_rows))
    of_sets = {}
    for name, rows in val_sets.items():
        n_measured = min(len(rows), training.eval_iters * training.batch_size)
        of_sets[name] = fingerprint(rows, n_measured) + " within documents" * training.document_mask
    of_tasks = None if tasks is None else tasks.fingerprint
    first = next(iter(of_sets.values()), None)
    check_same_data(train, first, of_tasks)
    if training.best_metric is None:
        return train, first
    if BestMetric(training.best_metric).of_tasks:
        return train, f"{training.best_metric} {of_tasks}"
    return train, f"{training.best_metric} {of_sets.get(training.best_metric.split('/')[1], first)}"


def _reference(config: ConfigDict, programs: setup.Setup, origin: resume.Origin, folder: Path) -> Reference:
    training, mesh = config.training, programs.mesh
    score = make_score_step(programs.graph, mesh)
    n_heads, dtype = config.model.n_heads, programs.c.dtype.name
    return Reference(folder, origin, training.init_from, n_heads, dtype, score, mesh, training.batch_size)


def _samples(
    objective: objective_lib.Objective, length: Length, programs: setup.Setup, tokenizer, training: ConfigDict
) -> Samples | None:
    """None where the run writes none, or those of its objective."""
    if length.samples_interval is None or objective.samples is not None:
        return None
    prompts, chat = training.sample_prompts, training.sample_chat
    return Samples(programs.graph, programs.abstract_params, tokenizer, prompts, chat, programs.mesh)


def _metrics(
    config: ConfigDict, programs: setup.Setup, shape: BatchShape, length: Length, start_step: int, progress: Progress
) -> Metrics:
    training, c = config.training, programs.c
    peak_flops = flops.peak_flops(jax.devices()[0].device_kind, c.dtype)
    flops_per_token = flops.training_flops_per_token(c, shape.seq_len)
    mfu_per_token = flops_per_token / (peak_flops * jax.device_count()) if peak_flops else None
    paths = jax.tree.leaves_with_path(programs.abstract_params)
    leaf_names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]
    return Metrics(
        Path(training.out_dir), leaf_names, start_step, progress.evaluated_step == start_step, length.total_steps,
        shape.tokens, length.log_interval, mfu_per_token, config_lib.options(WandbOptions, config.wandb), training.profile_step,
    )  # fmt: skip


def compile_step(programs: setup.Setup, state: TrainState, batch, checkpoints: Checkpoints) -> jax.stages.Compiled:
    """Compile before the loop, so that the memory is known before the first step and nothing compiles inside: arrays of other
    shapes are an error.
    """
    with cudnn.clear_rejections():
        compiled = lower(programs.train_step, state, batch, programs.c.deterministic).compile()
    out_of_memory.check(compiled, *LOWER)
    log_memory(compiled)
    checkpoints.leave_room_for(compiled)
    return compiled
