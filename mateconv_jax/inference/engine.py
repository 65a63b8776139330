"""Continuous batching: requests join and leave a running batch, and each gets the text that it would get alone.

engine = Engine(generator, max_batch=16)
engine.start()
request = engine.submit(ids, GenerationConfig(...), listener)
engine.stop()

One thread runs everything on the device: it admits waiting requests into free slots, reads their prompts, decodes a few tokens
of all active rows in one dispatch, and tells listeners. Between two dispatches rows come and go. See slots.py for the programs.
"""

import collections
import copy
import dataclasses
import itertools
import logging
import math
import threading
import time
from collections.abc import Callable

import jax
import numpy as np

from mateconv_jax.common_prefix import common_prefix
from mateconv_jax.errors import UserError, is_out_of_memory
from mateconv_jax.generation_config import GenerationConfig
from mateconv_jax.inference.detokenizer import Detokenizer
from mateconv_jax.inference.request import Event, Failed, Finished, Piece, QueueFull, Request, Started, TokenLogprob
from mateconv_jax.inference.sampling import MAX_LOGIT_BIAS, Sampling
from mateconv_jax.inference.slots import MAX_STEPS, TOP_LOGPROBS, Moves, Output, Progress, Rows, SlotPrograms
from mateconv_jax.inference.text_generator import Generation, TextGenerator
from mateconv_jax.runtime import out_of_memory

logger = logging.getLogger(__name__)

# A dispatch takes so many steps that the host's work between two dispatches is at most this share of the time.
HOST_SHARE = 0.03
# Too little memory: see out_of_memory.as_user_error.
LOWER = "max_batch", "lower it, or the context: the cache has room for their product"
# A batch becomes smaller once it has been too large for this many dispatches: it costs a copy of all its rows.
SHRINK_AFTER = 8
# Copy from another slot what it holds of a prompt from so many tokens on: 2 to 4 ms. 16 samples of one prompt have their first
# tokens after 146 instead of 217 ms (20 tokens), 451 instead of 1,763 (200), 481 instead of 2,781 (450); base model, 2 cores.
WORTH_COPYING = 16


@dataclasses.dataclass(eq=False)
class Slot:
    """A row of the pool.

    Attributes:
      held: the tokens whose keys and values the pool's row has.
      request: the one that is being answered; None: the slot is free.
      row: the request's row in the batch; None: not there yet.
      remaining: new tokens that the request may still get.
      used: when it was last used, a counter.
    """

    number: int
    held: list[int] = dataclasses.field(default_factory=list)
    request: Request | None = None
    row: int | None = None
    remaining: int = 0
    used: int = 0


@dataclasses.dataclass
class Counters:
    """What an engine has done since its start."""

    dispatches: int = 0
    prefills: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    failed_dispatches: int = 0


class Engine:
    """Answers requests from a queue, up to max_batch of them at a time.

    Attributes:
      context: tokens of a prompt and its answer.
      counters: see Counters.
    """

    def __init__(self, generator: TextGenerator, max_batch: int = 16, context: int | None = None, max_queue: int = 1024):
        """
        Args:
          context: at most the model's; None: the model's.
          max_queue: requests that may wait.

        Raises:
          UserError: more context than the model has.
        """
        self.context = context or generator.max_seq_len
        if self.context > generator.max_seq_len:
            raise UserError(f"--context: {context} is more than the model's context (expected at most {generator.max_seq_len})")
        self._generator, self._max_queue = generator, max_queue
        self._tokenizer = copy.deepcopy(generator.tokenizer)  # another thread encodes with the generator's
        self._vocab_size = generator.model_config.vocab_size
        self._programs = SlotPrograms(generator.graph, generator.model_config, generator.end_ids, max_batch, self.context)
        self._slots = [Slot(i) for i in range(max_batch)]
        self._waiting: collections.deque[Request] = collections.deque()
        self._wake = threading.Condition()
        self._is_stopping = False
        self._clock = itertools.count(1)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._too_large = 0  # dispatches since a smaller batch would have done
        self._steps = 1
        self._sampling: Sampling | None = None  # of the batch's rows; None: they changed
        self._pool: Rows
        self._batch: Rows
        self.counters = Counters()

    # ---- for any thread ---------------------------------------------------------------------------------------------

    def start(self, progress=lambda done, total: None) -> None:
        """Compile all programs and start answering. progress(done, total) is called after each program."""
        with out_of_memory.as_user_error(*LOWER):
            self._programs.compile(self._generator.params, progress)
            self._forget_everything()
        self._thread.start()

    def submit(
        self,
        ids: list[int],
        config: GenerationConfig,
        listener: Callable[[Event], None],
        sample: int = 0,
        top_logprobs: int | None = None,
        continues: bool = False,
    ) -> Request:
        """Queue a request.

        Args:
          ids: the prompt, 1 to context - 1 tokens.
          config: its use_cache and truncate_prompt mean nothing here.
          listener: called from the engine's thread with Started, any number of Pieces, and Finished or Failed at the end. It
            must return quickly and raise nothing.
          sample: the request's index among the samples of its prompt.
          top_logprobs: None: no log-probabilities; otherwise the number of alternatives for each token, at most 20.
          continues: the answer continues the prompt's text; otherwise it begins a turn.

        Raises:
          QueueFull: max_queue requests wait.
          UserError: a prompt that is empty or leaves no room, or too many logit biases or alternatives.
        """
        if not 0 < len(ids) < self.context:
            raise UserError(
                f"prompt: {len(ids)} tokens leave no room in the context of {self.context} (expected 1 to {self.context - 1})"
            )
        if len(config.logit_bias) > MAX_LOGIT_BIAS:
            raise UserError(f"logit_bias: {len(config.logit_bias)} tokens (expected at most {MAX_LOGIT_BIAS})")
        if not 0 <= (top_logprobs or 0) <= TOP_LOGPROBS:
            raise UserError(f"top_logprobs: {top_logprobs} is invalid (expected 0 to {TOP_LOGPROBS})")
        detokenizer = Detokenizer(self._tokenizer, config.stop, ids[-1:] if continues else None)
        request = Request(ids, config, sample, top_logprobs, listener, detokenizer)
        with self._wake:
            if len(self._waiting) >= self._max_queue:
                raise QueueFull
            self._waiting.append(request)
            self._wake.notify()
        return request

    def stop(self) -> None:
        """Fail what is unfinished and end the thread."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    @property
    def n_active(self) -> int:
        return sum(slot.request is not None for slot in self._slots)

    # ---- the engine's thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._waiting or self._active() or self._is_stopping)
                if self._is_stopping:
                    break
            try:
                self._drop_cancelled()
                self._admit()
                if self._active():
                    self._dispatch()
            except Exception as error:
                self.counters.failed_dispatches += 1
                if is_out_of_memory(error):
                    logger.error("a dispatch failed: %s", out_of_memory.explain(error, *LOWER))
                    self._fail_active("out of memory")
                    continue
                logger.exception("a dispatch failed")
                self._fail_active(f"a dispatch failed: {type(error).__name__}")
        self._fail_active("the engine stops")
        while self._waiting:
            self._waiting.popleft().listener(Failed("the engine stops"))

    def _active(self) -> list[Slot]:
        return [slot for slot in self._slots if slot.request is not None]

    def _forget_everything(self) -> None:
        """Fresh arrays: those of a failed dispatch may be gone."""
        for slot in self._slots:
            slot.held, slot.row = [], None
        self._pool = self._programs.empty_pool()
        self._batch = self._programs.empty_batch(self._programs.batch_sizes[0], self._programs.lengths[0])
        self._sampling = None

    def _fail_active(self, reason: str) -> None:
        self._fail(self._active(), reason)
        self._forget_everything()

    def _fail(self, slots: list[Slot], reason: str) -> None:
        for slot in slots:
            request, slot.request = slot.request, None
            assert request is not None
            request.listener(Failed(reason))

    def _drop_cancelled(self) -> None:
        with self._wake:
            waiting, self._waiting = self._waiting, collections.deque()
            self._waiting.extend(request for request in waiting if not request.is_cancelled)
        for request in waiting:
            if request.is_cancelled:
                request.listener(Failed("cancelled"))
        cancelled = [slot for slot in self._active() if slot.request is not None and slot.request.is_cancelled]
        self._release(cancelled)
        self._fail(cancelled, "cancelled")

    # ---- joining ------------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Give waiting requests the free slots, and read their prompts.

        Those that arrive meanwhile join too, rather than wait for a dispatch: of 16 clients that ask at once, the first is read
        alone. After as many requests as there are slots the running rows go on.
        """
        n_admitted = 0
        while n_admitted < len(self._slots) and (admitted := self._take_slots()):
            n_admitted += len(admitted)
            lengths = [len(slot.request.ids) for slot, _ in admitted if slot.request is not None]
            n_new = [length - n_same for length, (_, n_same) in zip(lengths, admitted, strict=True)]
            for P, indices in self._programs.prefill_groups(lengths, n_new):
                self._prefill([admitted[i] for i in indices], P)

    def _take_slots(self) -> list[tuple[Slot, int]]:
        """Give waiting requests the free slots: (slot, tokens of the prompt that it holds already) of those to be read.

        What any slot holds of a prompt is copied rather than read again: the samples of one prompt, and dialogues that begin
        with the same system prompt, read it once. One that begins as a prompt that is only about to be read waits for it.
        """
        taken, being_read = [], []
        for request in list(self._waiting):
            if not (free := [slot for slot in self._slots if slot.request is None]):
                break
            slot, source, n_same = self._choose_slot(free, request.ids)
            if max((common_prefix(ids, request.ids) for ids in being_read), default=0) >= n_same + WORTH_COPYING:
                continue
            with self._wake:
                self._waiting.remove(request)
            slot.request, slot.used, slot.held = request, next(self._clock), request.ids[:n_same]
            slot.remaining = min(request.config.max_new_tokens, self.context - len(request.ids))
            self.counters.prompt_tokens += len(request.ids)
            self.counters.reused_tokens += n_same
            if source is not slot:
                self._pool = self._programs.copy(self._pool, source.number, slot.number)
            request.listener(Started(n_same))
            if slot.remaining:
                taken.append((slot, n_same))
                being_read.append(request.ids)
            else:
                self._finish(slot)
        return taken

    def _choose_slot(self, free: list[Slot], ids: list[int]) -> tuple[Slot, Slot, int]:
        """(free slot, slot to copy from, tokens of a prompt that this one holds): at most all but the prompt's last, which must
        be read to get logits.
        """
        prompt = ids[:-1]
        held = {slot: common_prefix(slot.held, prompt) for slot in self._slots}
        own = max(free, key=lambda slot: (held[slot], -slot.used))
        source = max(self._slots, key=lambda slot: held[slot])
        if held[source] >= held[own] + WORTH_COPYING:
            return min(free, key=lambda slot: slot.used), source, held[source]
        return own, own, held[own]

    def _prefill(self, group: list[tuple[Slot, int]], P: int) -> None:
        """Read the prompts of `group`, from n_same on, and draw their first tokens. Unused rows repeat the first."""
        rows = [*group, *[group[0]] * (P - len(group))]
        requests = [slot.request for slot, _ in rows if slot.request is not None]
        length_P = np.array([len(request.ids) for request in requests], np.int32)
        tokens_PT = np.zeros((P, self._programs.prefill_length(P)), np.int32)
        for tokens_T, request in zip(tokens_PT, requests, strict=True):
            tokens_T[: len(request.ids)] = request.ids
        slots_P = np.array([slot.number for slot, _ in rows], np.int32)
        start_P = np.array([n_same for _, n_same in rows], np.int32)
        remaining_P = np.array([slot.remaining for slot, _ in rows], np.int32)
        wants_P = np.array([request.top_logprobs is not None for request in requests])
        sampling = Sampling.for_rows(
            [request.config for request in requests], [request.sample for request in requests], self._vocab_size
        )
        done, total = 0, int((length_P - start_P).max())
        output: Output | None = None
        while done < total:
            C = self._programs.chunk(P, total - done)
            # A row that ends earlier, or near the end of the cache, reads some of its tokens again.
            from_P = np.minimum(start_P + done, np.maximum(length_P - C, 0)).astype(np.int32)
            arguments = (slots_P, tokens_PT, from_P, length_P, remaining_P, wants_P, sampling)
            self._pool, output = self._programs.prefill(self._generator.params, self._pool, C, arguments)
            self.counters.prefills += 1
            done += C
        for slot, _ in group:
            assert slot.request is not None
            slot.held = list(slot.request.ids)
        assert output is not None
        self._leave(self._read(output, [slot for slot, _ in group], np.ones(P, np.int32)))

    # ---- decoding -----------------------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        """A few tokens for all active rows."""
        load = self._fit_batch()
        slots, steps = self._active(), self._steps
        begin = time.perf_counter()
        progress = self._progress(slots)
        length_B = progress.length_B
        self._pool, self._batch, output = self._call_decode(progress, load, [], steps)
        self.counters.dispatches += 1
        dispatched = time.perf_counter()
        output.length_B.block_until_ready()
        device_time = time.perf_counter() - dispatched
        by_row = sorted(slots, key=lambda slot: slot.row or 0)
        rows = [slot.row for slot in by_row]
        n_new_B = np.asarray(output.length_B) - length_B
        steps_done = max(1, int(n_new_B.max()))
        finished = self._read(output, by_row, n_new_B, rows)
        # Without joining and leaving: 3 to 17 ms now and then, which made the following dispatches twice as long.
        host_time = time.perf_counter() - begin - device_time
        self._steps = min(MAX_STEPS, max(1, math.ceil(host_time / HOST_SHARE / (device_time / steps_done))))
        self._leave(finished)

    def _call_decode(self, progress: Progress, load, store, steps: int):
        B = len(progress.length_B)
        if self._sampling is None:
            by_row = {slot.row: slot.request for slot in self._slots if slot.row is not None}
            requests = [by_row.get(row) for row in range(B)]
            configs = [request.config if request else GenerationConfig(do_sample=False) for request in requests]
            samples = [request.sample if request else 0 for request in requests]
            # On the device: 14 arrays that need not be copied for every dispatch.
            self._sampling = jax.device_put(Sampling.for_rows(configs, samples, self._vocab_size))
        arguments = (progress, self._sampling, Moves.make(load, B), Moves.make(store, B), np.int32(steps))
        return self._programs.decode(self._generator.params, self._pool, self._batch, arguments)

    def _progress(self, slots: list[Slot]) -> Progress:
        B = self._batch.tokens.shape[0]
        one_B = np.ones(B, np.int32)
        progress = Progress(one_B, one_B.copy(), one_B.copy(), np.ones(B, bool), np.zeros(B, bool))
        for slot in slots:
            request, row = slot.request, slot.row
            assert request is not None and row is not None
            progress.length_B[row] = len(request.ids) + len(request.answer)
            progress.prompt_length_B[row] = len(request.ids)
            progress.remaining_B[row] = slot.remaining
            progress.finished_B[row] = False
            progress.wants_logprobs_B[row] = request.top_logprobs is not None
        return progress

    def _fit_batch(self) -> list[tuple[int, int]]:
        """Give every active request a row in a batch of the right size. Returns the (row, slot) to copy from the pool."""
        active = self._active()
        batch_sizes, lengths = self._programs.batch_sizes, self._programs.lengths
        longest = max(len(slot.request.ids) + len(slot.request.answer) for slot in active if slot.request is not None)
        B = next(size for size in batch_sizes if size >= len(active))
        T = next(size for size in lengths if size >= min(longest + self._steps, self.context))
        now_B, now_T = self._batch.tokens.shape
        is_smaller = B <= now_B and T <= now_T and (B, T) != (now_B, now_T)
        self._too_large = self._too_large + 1 if is_smaller else 0
        nobody = all(slot.row is None for slot in active)
        if B > now_B or T > now_T or self._too_large > SHRINK_AFTER or nobody and is_smaller:
            self._release([slot for slot in active if slot.row is not None])
            if not nobody and not self._too_large > SHRINK_AFTER:  # grow in one direction at a time
                B, T = max(B, now_B), max(T, now_T)
            self._batch = self._programs.empty_batch(B, T)
            now_B, self._too_large = B, 0
        taken = {slot.row for slot in active}
        rows = (row for row in range(now_B) if row not in taken)
        load = []
        for slot in active:
            if slot.row is None:
                slot.row = next(rows)
                load.append((slot.row, slot.number))
        if load:
            self._sampling = None
        return load

    def _release(self, slots: list[Slot]) -> None:
        """Copy rows that leave the batch into the pool."""
        in_batch = [slot for slot in slots if slot.row is not None]
        if not in_batch:
            return
        pairs = [(slot.row or 0, slot.number) for slot in in_batch]
        self._pool, self._batch, _ = self._call_decode(self._progress([]), [], pairs, 0)
        for slot in in_batch:
            request = slot.request
            assert request is not None
            slot.held = [*request.ids, *request.answer][:-1]  # the last token is not in the cache yet
            slot.row, slot.used = None, next(self._clock)

    # ---- results ------------------------------------------------------------------------------------------------------

    def _read(self, output: Output, slots: list[Slot], n_new_B, rows: list[int | None] | None = None) -> list[Slot]:
        """Tell listeners of the new tokens. `rows`: of the slots; None: 0, 1, 2 …  Returns the slots of finished requests."""
        tokens_BN, finished_B = np.asarray(output.tokens_BN), np.asarray(output.finished_B)
        wanted = any(slot.request is not None and slot.request.top_logprobs is not None for slot in slots)
        logprobs = [np.asarray(x) for x in (output.logprobs.chosen_BN, output.logprobs.token_BNK, output.logprobs.logprob_BNK)]
        finished = []
        for row, slot in zip(rows or range(len(slots)), slots, strict=True):
            request = slot.request
            assert request is not None and row is not None
            tokens = tokens_BN[row, : n_new_B[row]].tolist()
            slot.remaining -= len(tokens)
            self.counters.new_tokens += len(tokens)
            details = []
            if wanted and request.top_logprobs is not None:
                details = [_logprob(request.top_logprobs, logprobs, (row, i), token) for i, token in enumerate(tokens)]
            if self._push(request, tokens, details) or finished_B[row]:
                finished.append(slot)
        return finished

    def _leave(self, slots: list[Slot]) -> None:
        """Free the slots of finished requests."""
        self._release(slots)
        for slot in slots:
            self._finish(slot)

    def _push(self, request: Request, tokens: list[int], details: list[TokenLogprob]) -> bool:
        """Turn new tokens into text and say so. Returns whether a stop text ended the answer."""
        text, pushed = request.detokenizer, []
        request.answer += tokens
        shown = [token for token in tokens if token not in self._generator.end_ids]
        for token in shown:
            if not text.stopped:
                pushed.append(text.push(token))
        piece = "".join(pushed)
        request.pieces.append(piece)
        if pushed:
            request.listener(Piece(piece, shown[: len(pushed)], details[: len(pushed)]))
        return text.stopped

    def _finish(self, slot: Slot) -> None:
        request, slot.request = slot.request, None
        assert request is not None
        ids, text = request.answer, request.detokenizer
        ids, reason = self._generator.ended(ids, request.config)
        if rest := text.finish():
            request.pieces.append(rest)
            request.listener(Piece(rest, [], []))
        reason = "stop" if text.stopped else reason
        whole = Generation("".join(request.pieces), ids[: text.n_tokens], len(request.ids), reason)
        request.listener(Finished(whole))


def _logprob(n: int, logprobs: list[np.ndarray], at: tuple[int, int], token: int) -> TokenLogprob:
    chosen, token_K, logprob_K = (x[at] for x in logprobs)
    return TokenLogprob(token, float(chosen), list(zip(token_K[:n].tolist(), logprob_K[:n].tolist(), strict=True)))
