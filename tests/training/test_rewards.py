"""Reward functions of other people: slow, wrong, raising."""

import math
import threading

import numpy as np
import pytest

from mateconv_jax import rewards as built_in
from mateconv_jax.errors import UserError
from mateconv_jax.training import rewards as rewards_lib
from mateconv_jax.training.rewards import Rewards, wait_for

HERE = "tests.training.test_rewards"


def length(prompts, completions, records):
    return [len(text) for text in completions]


def picky(prompts, completions, records):
    """Fails on answers that begin with f."""
    if any(text.startswith("f") for text in completions):
        raise SystemExit("no f please") if "fail" in completions else RuntimeError("no f please")
    return [None if text == "none" else math.inf if text == "inf" else 1.0 for text in completions]


def too_few(prompts, completions, records):
    return [1.0] * (len(completions) - 1)


def waiting(prompts, completions, records):
    """Ends when eight calls wait and the test waits too."""
    records[0]["together"].wait(timeout=60)
    return [record["answer"] for record in records]


def score(functions, completions, weights=()):
    rewards = Rewards(tuple(f"{HERE}:{name}" for name in functions), weights, 2)
    futures = rewards.start("问", completions, {"answer": 7})
    assert wait_for(futures, lambda: False)
    return rewards, np.stack([future.result() for future in futures])


def test_rewards_are_weighted_and_an_answer_without_one_of_them_has_none():
    rewards, reward_FN = score(["length", "picky"], ["a", "none", "fail", "inf", "abcd"], (0.5, 2.0))
    assert reward_FN[0].tolist() == [1, 4, 4, 3, 4]
    np.testing.assert_array_equal(reward_FN[1], [1, np.nan, np.nan, np.nan, 1])
    np.testing.assert_array_equal(rewards.total(reward_FN), [2.5, np.nan, np.nan, np.nan, 4])


def test_a_function_that_returns_too_few_gives_none(caplog):
    _, reward_FN = score(["too_few"], ["a", "b"])
    assert np.isnan(reward_FN).all()


def test_functions_run_beside_each_other_and_waiting_ends_when_the_run_stops():
    rewards = Rewards((f"{HERE}:waiting",), (), 8)
    together = threading.Barrier(9)
    futures = [future for _ in range(8) for future in rewards.start("问", ["a"], {"answer": 7, "together": together})]
    assert not wait_for(futures, lambda: True)
    together.wait(timeout=60)
    assert wait_for(futures, lambda: False)
    assert [future.result().tolist() for future in futures] == [[7.0]] * 8


@pytest.mark.parametrize(
    "functions, weights, message",
    [
        ((), (), "reward.functions: empty"),
        (("nowhere:length",), (), "reward.functions: 'nowhere:length' cannot be imported"),
        ((f"{HERE}:nothing",), (), "cannot be imported"),
        ((f"{HERE}:HERE",), (), "is not a function"),
        ((f"{HERE}:length", f"{HERE}:length"), (), "two have the same name"),
        ((f"{HERE}:length",), (1.0, 2.0), "reward.weights: 2 weights for 1 functions"),
    ],
)
def test_what_cannot_reward(functions, weights, message):
    with pytest.raises(UserError, match=message):
        Rewards(functions, weights, 1)


def test_built_in_functions():
    answers = ["3加14等于17。", "17", "1,700", "没有"]
    assert built_in.number_match([""] * 4, answers, [{"answer": 17}] * 4) == [1, 1, 0, 0]
    assert built_in.number_match([""], ["共 1,700 元"], [{"answer": "1700"}]) == [1]
    said = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "好 "}]}
    assert built_in.exact_match([""] * 2, [" 好", "不好"], [said] * 2) == [1, 0]
    assert built_in.pattern_match([""] * 2, ["<a>1\n</a>", "x"], [{"pattern": "<a>.*</a>"}] * 2) == [1, 0]
    with pytest.raises(ValueError, match="no number"):
        built_in.number_match([""], ["1"], [{"answer": "一"}])
    with pytest.raises(ValueError, match='has no "answer"'):
        built_in.exact_match([""], ["1"], [{"prompt": "一"}])


def test_a_failing_function_is_logged_a_few_times_only(caplog, monkeypatch):
    shown = []
    monkeypatch.setattr(rewards_lib.logging, "warning", lambda *args, **_: shown.append(args))
    score(["picky"], ["f"] * 20)
    assert len(shown) == rewards_lib.SHOWN
