"""What the processes of a run decide together, since the collective that follows needs all of them.

It goes through the key-value store of jax's coordinator: no device takes part, so a decision waits for no computation, and
cannot get between the collectives of another thread.
"""

import collections
import itertools
import json
from collections.abc import Callable
from typing import Any

import jax
from jax._src import distributed

_numbers = itertools.count()  # every process makes the same agreements in the same order
_rounds: collections.Counter[str] = collections.Counter()


def gather(name: str, value: Any = None) -> list[Any]:
    """The values that all processes give, in the order of the processes. It is a barrier, too: it returns once all have called
    it. Every process calls it equally often with the same name, in its main thread.

    A process that dies meanwhile ends this one: see notices.Notices.

    Args:
      value: anything that JSON holds.
    """
    if jax.process_count() == 1:
        return [value]
    client, me, number = store(), jax.process_index(), _rounds[name]
    folder = f"mateconv_jax/gather/{name}"
    client.key_value_set(f"{folder}/{number}/{me}", json.dumps(value))
    values = [json.loads(_wait(f"{folder}/{number}/{process}")) for process in range(jax.process_count())]
    if number:  # all are past the round before
        client.key_value_delete(f"{folder}/{number - 1}/{me}")
    _rounds[name] += 1
    return values


def from_first(name: str, value: Any) -> Any:
    """The first process's value, in all of them. See gather."""
    return gather(name, value)[0]


def _wait(key: str) -> str:
    while True:
        try:
            return store().blocking_key_value_get(key, 1000)  # a second: Python handles no signal meanwhile
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


class AgreedStep:
    """The first process decides, by its clock for example, that something is due, and names a step that no process has reached
    yet; all of them act at that step. Afterwards the next may be agreed on.

    It goes through the key-value store of jax's coordinator, 0.14 ms a step. A process that is alone acts at once.
    """

    # A process that has dispatched step t has read the metrics of t - 1, which needed every process: the first had dispatched
    # t - 1 too, and what it announced before that, at t - 2 or earlier, is there.
    AHEAD = 2

    def __init__(self):
        self._folder, self._round = f"mateconv_jax/agreed_step/{next(_numbers)}", 0
        self._agreed: int | None = None

    def reached(self, step: int, is_due: Callable[[], bool]) -> bool:
        """Whether all processes are to act now. Each calls it once after every step, at the same place.

        Args:
          is_due: asked in the first process only.
        """
        if self._agreed is None:
            self._agreed = self._announce(step, is_due) if jax.process_index() == 0 else self._announced()
        if self._agreed is None or step < self._agreed:
            return False
        self._agreed, self._round = None, self._round + 1
        return True

    def _announce(self, step: int, is_due: Callable[[], bool]) -> int | None:
        if not is_due():
            return None
        if jax.process_count() == 1:
            return step
        store().key_value_set(f"{self._folder}/{self._round}/step", str(step + self.AHEAD))
        return step + self.AHEAD

    def _announced(self) -> int | None:
        found = store().key_value_dir_get(f"{self._folder}/{self._round}")
        return int(found[0][1]) if found else None


def store():
    """The client of jax's coordinator."""
    assert distributed.global_state.client is not None  # there are several processes
    return distributed.global_state.client
