"""Reward functions that tests name in a config, and that misbehave where the environment says so."""

import itertools
import os
import signal
import threading

from mateconv_jax.training.rollouts import Rollouts

_calls = itertools.count(1)


def variety(prompts, completions, records):
    """Different characters in an answer. MATECONV_KILL_REWARD=n: the n-th call ends the process."""
    if next(_calls) == int(os.environ.get("MATECONV_KILL_REWARD", 0)):
        os.kill(os.getpid(), signal.SIGKILL)
    return [len(set(text)) / 10 for text in completions]


def even_length(prompts, completions, records):
    return [float(len(text) % 2 == 0) for text in completions]


def low_ids(prompts, completions, records):
    return [sum(token < 200 for token in completion.token_ids) / len(completion.token_ids) for completion in completions]


if at := int(os.environ.get("MATECONV_KILL_ROLLOUT", 0)):  # the process ends 10 ms after its at-th rollout begins
    _rollouts, _roll_out = itertools.count(1), Rollouts.__call__

    def _dying(self, *args):
        if next(_rollouts) == at:
            threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return _roll_out(self, *args)

    Rollouts.__call__ = _dying
