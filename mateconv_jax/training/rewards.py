"""Rewards of answers: Python functions that the config names, called in threads.

Dimensions in names: F functions, G answers of a prompt, N answers of a step.
"""

import importlib
import math
import os
import queue
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait

import numpy as np
from absl import logging

from mateconv_jax.errors import UserError

# (prompts, completions, records) -> a reward for each completion
RewardFunction = Callable[[list, list, list[dict]], list[float]]

WAITING_S = 0.1  # between two questions whether to stop
SHOWN = 3  # errors of a function that the log shows


def find_function(name: str) -> RewardFunction:
    """The function that "module:function" names. Modules in the current folder are found too.

    Raises:
      UserError: there is none.
    """
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:  # an installed command does not look there
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # importing a module runs it
        raise UserError(
            f'reward.functions: {name!r} cannot be imported ({type(error).__name__}: {error}; expected "module:function", such '
            'as "mateconv_jax.rewards:number_match")'
        ) from error
    if not callable(found):
        raise UserError(f"reward.functions: {name!r} is not a function")
    return found


class Rewards:
    """Scores answers with every function.

    Attributes:
      names: of the functions, without their modules.
    """

    def __init__(self, functions: tuple[str, ...], weights: tuple[float, ...], n_threads: int):
        """
        Args:
          functions: see find_function.
          weights: one each; empty: 1 each.

        Raises:
          UserError: a function is not found, or two have the same name; as many weights as functions are expected.
        """
        self._functions = [find_function(name) for name in functions]
        self.names = [name.partition(":")[2] for name in functions]
        if not functions:
            raise UserError('reward.functions: empty (expected "module:function", such as "mateconv_jax.rewards:number_match")')
        if len(set(self.names)) < len(self.names):
            raise UserError(f"reward.functions: two have the same name ({', '.join(self.names)}; expected different names)")
        if weights and len(weights) != len(functions):
            raise UserError(f"reward.weights: {len(weights)} weights for {len(functions)} functions (expected one each)")
        self._weight_F = np.array(weights or [1.0] * len(functions))
        self._n_errors = dict.fromkeys(self.names, 0)
        self._calls: queue.SimpleQueue = queue.SimpleQueue()
        # Daemons: a function that takes minutes must not keep a stopped run from ending.
        for _ in range(n_threads):
            threading.Thread(target=self._work, daemon=True).start()

    def start(self, prompt, completions: Sequence[str], record: dict) -> list[Future]:
        """Score the answers to a prompt; returns one future for each function, of rewards (G,)."""
        futures = []
        for name, function in zip(self.names, self._functions, strict=True):
            future = Future()
            self._calls.put(
                (future, name, function, [prompt] * len(completions), list(completions), [record] * len(completions))
            )
            futures.append(future)
        return futures

    def of(self, prompts: Sequence, answers: Sequence[str], records: Sequence[dict]) -> np.ndarray:
        """Score one answer to each prompt: (F, N), NaN where a function gave no reward."""
        futures = [self.start(*each) for each in zip(prompts, [[answer] for answer in answers], records, strict=True)]
        reward_FN = collect(futures)
        assert reward_FN is not None  # nobody asks it to stop
        return reward_FN

    def total(self, reward_FN: np.ndarray) -> np.ndarray:
        """The weighted sum (N,) of the functions' rewards; NaN where one of them gave none."""
        return self._weight_F @ reward_FN

    def _work(self) -> None:
        while True:
            future, name, function, *answers = self._calls.get()
            future.set_result(self._score(name, function, *answers))

    def _score(self, name: str, function: RewardFunction, prompts: list, completions: list, records: list) -> np.ndarray:
        """Rewards (G,); NaN: that answer has none. If the call fails, each answer is tried alone."""
        try:
            rewards = [math.nan if reward is None else float(reward) for reward in function(prompts, completions, records)]
            if len(rewards) != len(completions):
                raise ValueError(f"{len(rewards)} rewards for {len(completions)} answers")
        except (Exception, SystemExit) as error:  # other people's code
            if len(completions) > 1:
                answers = zip(prompts, completions, records, strict=True)
                return np.concatenate([self._score(name, function, [p], [c], [r]) for p, c, r in answers])
            self._n_errors[name] += 1
            if self._n_errors[name] <= SHOWN:
                what = f"{type(error).__name__}: {error}"
                logging.warning("reward function %s failed on %r: %s", name, completions[0], what, exc_info=error)
            rewards = [math.nan]
        return np.array([reward if math.isfinite(reward) else math.nan for reward in rewards])


def collect(futures: list[list[Future]], should_stop: Callable[[], bool] = lambda: False) -> np.ndarray | None:
    """The rewards (F, N) of all answers, in order; None: should_stop() was true before. futures: as `start` gave them, for each
    prompt.
    """
    if not wait_for([future for of_prompt in futures for future in of_prompt], should_stop):
        return None
    return np.concatenate([np.stack([future.result() for future in of_prompt]) for of_prompt in futures], axis=1)


def wait_for(futures: list[Future], should_stop: Callable[[], bool]) -> bool:
    """Until all are done; False: should_stop() was true before."""
    pending = set(futures)
    while pending:
        if should_stop():
            return False
        _, pending = wait(pending, timeout=WAITING_S)
    return True
