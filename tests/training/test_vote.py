"""At which step several processes stop."""

import random
import threading

import pytest

from mateconv_jax.training.preemption import Vote


class Board:
    """What processes post is delivered to each of them later, in the same order."""

    def __init__(self, n_processes):
        self.votes = [Vote(self.of(process), n_processes) for process in range(n_processes)]
        self.posted, self.delivered = [], [0] * n_processes

    def of(self, process):
        class Notices:
            def post(_, kind, text=""):
                self.posted.append((process, kind, text))

        return Notices()

    def deliver(self, process):
        if self.delivered[process] < len(self.posted):
            sender, kind, text = self.posted[self.delivered[process]]
            self.delivered[process] += 1
            vote = self.votes[process]
            (vote.called if kind == "stop" else vote.voted)(sender, text)


@pytest.mark.parametrize("seed", range(20))
def test_all_stop_at_the_same_poll_whenever_one_is_asked(seed):
    """Each is at most two steps ahead of the others, as in a run: a step's metrics need all processes."""
    n, rng = 3, random.Random(seed)
    board, stops, polls = Board(n), {}, [0] * n
    ends, moved = threading.Event(), threading.Condition()

    def process(index):
        while not ends.is_set():
            with moved:
                moved.wait_for(lambda: ends.is_set() or polls[index] < min(polls) + 2)
            if board.votes[index].poll():
                stops[index] = polls[index]
                return
            with moved:
                polls[index] += 1
                moved.notify_all()

    threads = [threading.Thread(target=process, args=(index,), daemon=True) for index in range(n)]
    started = rng.randrange(n + 1)  # the others are still starting when the request comes
    for thread in threads[:started]:
        thread.start()
    board.of(rng.randrange(n)).post("stop")
    for _ in range(rng.randrange(10)):
        board.deliver(rng.randrange(n))
    for thread in threads[started:]:
        thread.start()
    for _ in range(100):
        board.deliver(rng.randrange(n))
    for index in range(n):
        for _ in range(10):
            board.deliver(index)
    for thread in threads:
        thread.join(10)
    ends.set()
    assert len(stops) == n and len(set(stops.values())) == 1


def test_without_a_request_nobody_stops():
    board = Board(2)
    assert not any(vote.poll() for vote in board.votes for _ in range(10))
