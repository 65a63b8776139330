"""Benchmark questions that a run asks its model now and then."""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

from absl import logging
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerFast

from mateconv_jax.model.config import ModelConfig
from mateconv_jax.tasks import results
from mateconv_jax.tasks.benchmark import AskOptions, Benchmark, metrics_of
from mateconv_jax.tasks.files import read_tasks
from mateconv_jax.tasks.questions import Task
from mateconv_jax.training.generated_answers import answer_records, default_check
from mateconv_jax.training.rewards import Rewards
from mateconv_jax.training.samples import FirstProcessGenerator


class TaskEvaluator:
    """Asks the same questions at every call: only the weights differ.

    Attributes:
      fingerprint: of what is asked and how.
      metric_names: what a call measures.
      writes_answers: whether the first process alone writes answers to some of the tasks.
    """

    def __init__(
        self,
        tasks: list[Task],
        options: AskOptions,
        tokenizer: PreTrainedTokenizerFast,
        graph: nnx.GraphDef,
        abstract_params: nnx.State,
        c: ModelConfig,
        mesh: Mesh,
        functions: tuple[str, ...],
        max_new_tokens: int,
    ):
        """functions: check the answers that the model writes; (): what suits them.

        Raises:
          UserError: see Benchmark and Rewards.
        """
        scored = [task for task in tasks if task.kind != "generation"]
        self._benchmark = Benchmark(scored, options, tokenizer, graph, c, mesh) if scored else None
        self._written = [
            (task, Rewards(functions or (default_check(task),), (), 8)) for task in tasks if task.kind == "generation"
        ]
        self.writes_answers = bool(self._written)
        if self._written:
            self._first = FirstProcessGenerator(graph, abstract_params, tokenizer, mesh)
        self._options, self._max_new_tokens = options, max_new_tokens
        self._metrics = {task.name: metrics_of(task) for task in scored}
        self._metrics |= {task.name: rewards.names for task, rewards in self._written}
        self.metric_names = [name for task in tasks for name in self._names(task)]
        asked = [[task.name, task.fingerprint()] for task in tasks]
        self.fingerprint = hashlib.sha256(repr([asked, options, functions]).encode()).hexdigest()[:16]
        self._tasks = tasks

    def log(self) -> None:
        """What is asked."""
        truncated = {}
        if self._benchmark is not None:
            truncated = dict(zip([task.name for task in self._benchmark.tasks], self._benchmark.n_truncated, strict=True))
        for task in self._tasks:
            n = f"{len(task.questions):,} questions" + f" of {len(task.subjects)} subjects" * (len(task.subjects) > 1)
            chance = "" if task.chance is None else f", {task.chance:.1%} by guessing"
            cut = f"; {n_cut:,} prompts lose their beginning" if (n_cut := truncated.get(task.name)) else ""
            logging.info("task %s: %s%s%s", task.name, n, chance, cut)

    @staticmethod
    def of(
        config: ConfigDict,
        graph: nnx.GraphDef,
        abstract_params: nnx.State,
        c: ModelConfig,
        mesh: Mesh,
        tokenizer: PreTrainedTokenizerFast,
    ) -> "TaskEvaluator | None":
        """Of a run; None: it asks nothing.

        Raises:
          UserError: the tasks cannot be read, or do not fit the options or the model.
        """
        training = config.training
        if not training.eval_tasks:
            return None
        # A comma may be part of a path that stands alone.
        alone = Path(training.eval_tasks).expanduser().exists()
        paths = [training.eval_tasks] if alone else re.split(r"\s*,\s*", training.eval_tasks.strip())
        tasks = [task.limited(training.eval_tasks_limit) for task in read_tasks(paths, "training.eval_tasks")]
        options = AskOptions(training.eval_tasks_shots, training.eval_tasks_score, shots_key="training.eval_tasks_shots")
        functions, longest = tuple(config.reward.functions), config.rollout.max_new_tokens
        return TaskEvaluator(tasks, options, tokenizer, graph, abstract_params, c, mesh, functions, longest)

    def __call__(self, params: nnx.State, should_stop: Callable[[], bool]) -> dict[str, float] | None:
        """tasks/NAME/acc and so on, of parameters on the mesh. What the model writes only the first process knows; the others
        lack it. None if `should_stop` became true before the end.
        """
        found = []
        if self._benchmark is not None:
            records = self._benchmark.records(params, should_stop)
            if records is None:
                return None
            found += zip(self._benchmark.tasks, records, strict=True)
        if self._written:
            with self._first.with_weights(params) as generator:
                if generator is not None:
                    how = self._options, self._max_new_tokens
                    found += [(task, answer_records(generator, task, rewards, *how)) for task, rewards in self._written]
        scalars = {}
        for task, records in found:
            values = results.means(task, records, self._metrics[task.name])
            of_task = {f"tasks/{task.name}/{metric}": value for metric, value in values.items()}
            scalars |= {name: of_task[name] for name in self._names(task) if name in of_task}
            if task.chance is not None:
                scalars[f"tasks/{task.name}/chance"] = task.chance
        return scalars

    def _names(self, task: Task) -> list[str]:
        """Of letters, which have one length, acc alone; the mean of subjects where there are several."""
        names = self._metrics[task.name]
        if task.kind == "choice" and self._options.score == "letters":
            names = names[:1]
        macro = [f"{name}_macro" for name in names] if len(task.subjects) > 1 else []
        return [f"tasks/{task.name}/{name}" for name in [*names, *macro, *["perplexity"] * (task.kind == "continuation")]]
