"""training.best_metric: which number of an evaluation decides what is best."""

import dataclasses
from collections.abc import Iterable, Mapping

from mateconv_jax.errors import UserError

LOW = ("loss", "ema_loss", "bits_per_byte", "perplexity", "kl")  # the last part of names of what shall be low


@dataclasses.dataclass(frozen=True)
class BestMetric:
    """
    Attributes:
      name: None: the loss of the first validation set, of the EMA if there is one.
    """

    name: str | None = None

    @property
    def of_tasks(self) -> bool:
        return self.name is not None and self.name.startswith("tasks/")

    @property
    def shall_be_high(self) -> bool:
        return self.name is not None and self.name.rpartition("/")[2] not in LOW

    @property
    def words(self) -> str:
        """What an evaluation without a new best lacks."""
        return "a lower loss" if self.name is None else f"a {'higher' if self.shall_be_high else 'lower'} {self.name}"

    def value(self, scalars: Mapping[str, float]) -> float | None:
        """In an evaluation; None: it did not measure it."""
        if self.name is None:
            return scalars.get("val/ema_loss", scalars.get("val/loss"))
        return scalars.get(self.name)

    def check(self, sets: Iterable[str], tasks: Iterable[str], of_loss: Iterable[str] | None) -> None:
        """Raises UserError where no evaluation of the run will have it.

        Args:
          sets: names of the validation sets; "" is one without a name.
          tasks: metrics of tasks/.
          of_loss: last parts of the metrics of val/; None: only an evaluation shows them.
        """
        if self.name is None:
            return
        known = list(tasks)
        prefixes = [f"val/{name}/" for name in sets if name] + ["val/"] * bool(list(sets))
        known += [prefix + metric for prefix in prefixes for metric in of_loss or ("loss",)]
        prefix = self.name.rpartition("/")[0] + "/"
        if self.name not in known and (of_loss is not None or prefix not in prefixes):
            raise UserError(
                f"training.best_metric: {self.name!r} is no number of this run's evaluations (expected "
                f"{', '.join(known) or 'none: there are no validation rows and no training.eval_tasks'})"
            )
