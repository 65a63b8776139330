"""Tasks with their prompts in tokens, to be scored with any weights of one model."""

import dataclasses
from collections.abc import Callable, Iterable

from flax import nnx
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from mateconv_jax.model.config import ModelConfig
from mateconv_jax.tasks import results
from mateconv_jax.tasks.encoding import encode
from mateconv_jax.tasks.prompts import Score, prompts
from mateconv_jax.tasks.questions import Task
from mateconv_jax.tasks.scoring import Scorer


@dataclasses.dataclass(frozen=True)
class AskOptions:
    """How questions are asked: see prompts.py. shots_key: the flag or configuration key of n_shots, for error messages."""

    n_shots: int = 0
    score: Score = "letters"
    chat: bool = False
    shots_key: str = "--shots"


class Benchmark:
    """Tasks of any kind but generation."""

    def __init__(
        self,
        tasks: list[Task],
        options: AskOptions,
        tokenizer: PreTrainedTokenizerFast,
        graph: nnx.GraphDef,
        c: ModelConfig,
        mesh: Mesh,
        batch_size: int | None = None,
    ):
        """
        Args:
          batch_size: see Scorer.

        Raises:
          UserError: too few examples; an answer that cannot be scored.
        """
        self._prompts = [prompts(task, options.n_shots, options.score, options.chat, options.shots_key) for task in tasks]
        self._answers = [encode(tokenizer, of_task, c.max_seq_len) for of_task in self._prompts]
        answers = [answer for of_task in self._answers for of_prompt in of_task for answer in of_prompt]
        self._scorer = Scorer(graph, mesh, c.max_seq_len, c.vocab_size, answers, batch_size)
        self.tasks = tasks
        self.n_batches = len(self._scorer.batches)
        self.n_truncated = [sum(any(a.is_truncated for a in of_prompt) for of_prompt in of_task) for of_task in self._answers]

    def records(
        self,
        params: nnx.State,
        should_stop: Callable[[], bool] = lambda: False,
        progress: Callable[[Iterable, int], Iterable] = lambda batches, n: batches,
    ) -> list[list[dict]] | None:
        """Of each task its questions' records, see results.py. None if `should_stop` became true before the end.

        Args:
          params: on the mesh.
          progress: wraps the iteration over n batches, to show its progress.
        """
        scores = self._scorer(params, should_stop, progress)
        if scores is None:
            return None
        found, first = [], 0
        for of_task, answers in zip(self._prompts, self._answers, strict=True):
            found.append(results.records(of_task, answers, scores, first))
            first += sum(map(len, answers))
        return found


def metrics_of(task: Task) -> list[str]:
    """The numbers of its records, the first of which is the usual one."""
    return ["acc"] if task.kind == "continuation" else ["acc", "acc_norm", "acc_bytes"]
