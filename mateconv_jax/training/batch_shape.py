"""How large a step's batch is. A file of its own: planning needs it without the libraries that read data."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """The rows of a step.

    Attributes:
      batch_size: rows of a micro-batch over all devices.
      accumulation_steps: micro-batches.
      seq_len: targets of a row.
    """

    batch_size: int
    accumulation_steps: int
    seq_len: int

    @property
    def rows(self) -> int:
        return self.batch_size * self.accumulation_steps

    @property
    def tokens(self) -> int:
        """Targets."""
        return self.rows * self.seq_len
