"""How large a step's batch is, and where a run stands. Planning needs them without the libraries that read data."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """The rows of a step.

    Attributes:
      batch_size: rows of a micro-batch over all devices.
      accumulation_steps: micro-batches.
      seq_len: targets of a row, of one of its sequences.
      sequences: that the model reads for a row: 2 of a pair.
    """

    batch_size: int
    accumulation_steps: int
    seq_len: int
    sequences: int = 1

    @property
    def rows(self) -> int:
        return self.batch_size * self.accumulation_steps

    @property
    def tokens(self) -> int:
        """Targets."""
        return self.rows * self.sequences * self.seq_len


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a run stands: `step` optimizer steps are done, and `rows` rows of its data are read. A resumed run may change its
    global batch, so one does not follow from the other.
    """

    step: int = 0
    rows: int = 0


START = Position()
