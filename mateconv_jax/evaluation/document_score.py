"""Bits per byte of documents that are scored one by one, whatever the tokenizer and the context.

A document is `<s>content</s>` (a tokenizer without `<s>` has `</s>` in its place): its bits are those of every token behind the
first, `</s>` among them; its bytes those of the content in UTF-8. Of a dialogue only what the assistant says counts, as in
training. A document longer than the context is cut into windows that overlap by one token, so that each token is scored once,
from what is before it in its window: as the rows of a dataset are, and lm_eval's rolling log-likelihood.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from mateconv_jax import weighted_paths
from mateconv_jax.data.dialogue import Dialogue
from mateconv_jax.data.rows import Batch, learned_targets
from mateconv_jax.data.tokenizer import tokenizer as tokenizer_lib
from mateconv_jax.data.tokenizer.chat import ChatEncoder, TemplateRefuses
from mateconv_jax.data.tokenizer.token_bytes import bytes_per_token
from mateconv_jax.errors import UserError
from mateconv_jax.evaluation import documents as documents_lib, held_out, references
from mateconv_jax.evaluation.comparison import Measure, Paired, Plain, ratio
from mateconv_jax.evaluation.documents import Document
from mateconv_jax.evaluation.scored_model import bar, config_of, on_mesh, open_to_score
from mateconv_jax.evaluation.table import print_numbers
from mateconv_jax.losses.next_token import token_losses
from mateconv_jax.model.transformer import abstract_model
from mateconv_jax.runtime import sharding

SHORTEST = 64  # tokens of the shortest rows: longer ones are powers of two, up to the context
LAG = 4  # batches dispatched but not yet read
SHOWN = 20  # documents that differ most


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A document's tokens (n,), which of them are scored as targets, and the bytes of what they write."""

    ids: np.ndarray
    learned: np.ndarray
    bytes: int


def evaluator(args) -> Callable[[str], dict]:
    """Of the command line; see evaluate.py."""
    reading = held_out.reading_of(args)
    if weighted := [text for text in args.data if weighted_paths.has_weights(text)]:
        raise UserError(
            f"--data: {weighted[0]!r} has weights, which mean nothing where documents are scored one by one (expected the "
            "paths alone, with spaces between them)"
        )
    if args.split is not None and not documents_lib.is_prepared(args.data):
        raise UserError(documents_lib.NO_SPLITS.format(" ".join(args.data)))
    documents, rejected = documents_lib.read(args.data, "--data", args.split, reading, args.by)
    described = {"data": args.data, "split": args.split, "by": args.by, "rejected": rejected}
    if args.reference is not None:
        described["references"] = references.bits_per_byte(args.reference, documents, reading)

    def evaluate(path: str) -> dict:
        return described | score(path, documents, args.batch_size, args.use_ema, args.dtype, args.tokenizer)

    return evaluate


def score(
    model_path: str,
    documents: Sequence[Document],
    batch_size: int | None = None,
    use_ema: bool | None = None,
    dtype: str = "auto",
    tokenizer: str | None = None,
) -> dict:
    """Score a model on documents, on all devices.

    Args: see `held_out.evaluate_run`; use_ema: None: EMA if the model has them.

    Returns:
      A dict: model_path; step; weights, "raw" or "ema"; seq_len, the tokens of the longest window; groups, {group: {documents,
      tokens (targets), bytes, bits_per_byte}}, in which "" is all of them; and documents, [{"place", "group", "bytes", "bits"}]
      in their order.

    Raises:
      UserError: the model, its tokenizer or EMA weights are missing; a size is out of range; a dialogue cannot be encoded.
    """
    model, own_tokenizer = open_to_score(model_path, tokenizer)
    mesh = sharding.make_mesh()
    batch_size = held_out.check_sizes(batch_size, None, mesh)
    encoded = encode(documents, own_tokenizer)
    seq_len = model.config.data.seq_len
    # Other lengths are even, which every backend serves.
    graph, abstract_params = abstract_model(config_of(model, dtype, seq_len if seq_len % 2 else None))
    use_ema = model.has_ema if use_ema is None else use_ema
    params = on_mesh(model, abstract_params, use_ema, mesh)
    nats = document_nats(make_score_rows(graph), params, encoded, seq_len, batch_size, mesh)
    scored = [
        {
            "place": document.place,
            "group": document.group,
            "bytes": one.bytes,
            "bits": float(x) / math.log(2) if math.isfinite(x) else None,
        }
        for document, one, x in zip(documents, encoded, nats, strict=True)
    ]
    targets = np.array([one.learned[1:].sum() for one in encoded])
    groups = {
        name: _sum_up([scored[i] for i in members], targets[members])
        for name, members in documents_lib.grouped(documents).items()
    }
    return {
        "model_path": str(model_path),
        "step": model.step,
        "weights": "ema" if use_ema else "raw",
        "seq_len": seq_len,
        "groups": groups,
        "documents": scored,
    }


def _sum_up(scored: list[dict], targets: np.ndarray) -> dict:
    n_bytes = sum(one["bytes"] for one in scored)
    bits = math.fsum(math.nan if one["bits"] is None else one["bits"] for one in scored)
    return {
        "documents": len(scored),
        "tokens": int(targets.sum()),
        "bytes": n_bytes,
        "bits_per_byte": bits / n_bytes if n_bytes and math.isfinite(bits) else None,
    }


# ---- tokens -------------------------------------------------------------------------------------------------------


def encode(documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast) -> list[Encoded]:
    """Raises UserError for a dialogue that the chat template refuses."""
    texts = [document.content for document in documents if isinstance(document.content, str)]
    texts_ids = iter(tokenizer_lib.encode(tokenizer, texts) if texts else [])
    end = tokenizer.eos_token_id
    begin = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    bytes_per_token_V = bytes_per_token(tokenizer)
    encoder = None if len(texts) == len(documents) else ChatEncoder(tokenizer)
    result = []
    for document in documents:
        if isinstance(document.content, Dialogue):
            assert encoder is not None
            try:
                ids, learned = map(np.array, encoder.encode(document.content))
            except TemplateRefuses as error:
                raise UserError(f"--data: {document.place!r}: {error}") from error
            result.append(Encoded(ids, learned, int(bytes_per_token_V[ids[1:][learned[1:]]].sum())))
        else:
            ids = np.array([begin, *next(texts_ids), end])
            result.append(Encoded(ids, np.ones(len(ids), bool), len(document.content.encode())))
    return result


# ---- nats ---------------------------------------------------------------------------------------------------------


def make_score_rows(graph):
    """The jitted `(params, batch of rows) -> (B,)`: the summed cross-entropy of each row's learned targets, fp32."""

    def score_rows(params, batch):
        tokens_BS1 = batch["tokens"].astype(jnp.int32)
        logits_BSV = nnx.merge(graph, params)(tokens_BS1[:, :-1])
        losses_BS, _ = token_losses(logits_BSV, tokens_BS1[:, 1:])
        return jnp.sum(losses_BS, axis=1, where=learned_targets(batch))

    return jax.jit(score_rows)


def document_nats(
    score_rows: Callable, params, encoded: Sequence[Encoded], seq_len: int, batch_size: int, mesh: Mesh
) -> np.ndarray:
    """(documents,) float64: the summed cross-entropy of each document's learned targets.

    Args:
      score_rows: see `make_score_rows`; one program is compiled for each length of rows.
      seq_len: targets of the longest window.
      batch_size: rows of that length; of shorter rows as many more as hold as many tokens.
    """
    nats = np.zeros(len(encoded))
    pending = collections.deque()

    def read_oldest():
        numbers, on_device = pending.popleft()
        np.add.at(nats, numbers, np.asarray(jax.device_get(on_device), np.float64)[: len(numbers)])

    batches = list(plan_batches(encoded, seq_len, batch_size))
    for windows, length, n_rows in bar(batches, len(batches)):
        batch = _rows(encoded, windows, length, n_rows)
        pending.append(([document for document, _ in windows], score_rows(params, sharding.to_devices(batch, mesh))))
        if len(pending) > LAG:
            read_oldest()
    while pending:
        read_oldest()
    return nats


def plan_batches(encoded: Sequence[Encoded], seq_len: int, batch_size: int) -> Iterable[tuple[list[tuple[int, int]], int, int]]:
    """Batches of windows of about the same length, longest first: ([(document, first token), …], targets of a row, rows)."""
    windows: dict[int, list[tuple[int, int]]] = collections.defaultdict(list)
    for document, one in enumerate(encoded):
        for start in range(0, len(one.ids) - 1, seq_len):
            targets = one.learned[start + 1 : start + seq_len + 1]
            if targets.any():
                windows[min(seq_len, max(SHORTEST, 1 << (len(targets) - 1).bit_length()))].append((document, start))
    for length in sorted(windows, reverse=True):
        n_rows = batch_size * (seq_len // length)
        for first in range(0, len(windows[length]), n_rows):
            yield windows[length][first : first + n_rows], length, n_rows


def _rows(encoded: Sequence[Encoded], windows: list[tuple[int, int]], length: int, n_rows: int) -> Batch:
    tokens_BS = np.zeros((n_rows, length + 1), np.int32)
    learned_BS = np.zeros(tokens_BS.shape, bool)
    length_B = np.zeros(n_rows, np.int32)
    for row, (document, start) in enumerate(windows):
        ids = encoded[document].ids[start : start + length + 1]
        length_B[row] = len(ids)
        tokens_BS[row, : len(ids)], learned_BS[row, : len(ids)] = ids, encoded[document].learned[start : start + length + 1]
    return {"tokens": tokens_BS, "learned": learned_BS, "length": length_B}


# ---- what is shown ------------------------------------------------------------------------------------------------


def print_result(result: dict) -> None:
    """Print a result of `evaluator` to standard output."""
    found = result.get("references", {}).get("bits_per_byte", {})
    rows = {}
    for group, scores in result["groups"].items():
        values = [scores["bits_per_byte"], *(of_groups.get(group) for of_groups in found.values())]
        cells = ["-" if value is None else f"{value:.3f}" for value in values]
        rows[group or "all"] = [f"{scores['documents']:,}", f"{scores['bytes']:,}", *cells]
    print_numbers(described(result), result["by"] or "", ["documents", "bytes", "bits per byte", *found], rows)


def described(result: dict) -> list[str]:
    """Lines on what was scored and what it is compared with."""
    step = "" if result["step"] is None else f", step {result['step']:,}"
    data = ", ".join([*result["data"], *([result["split"]] if result["split"] else [])])
    lines = [f"{result['model_path']}{step}, {result['weights']} weights, on {data}"]
    lines.append(f"each document by itself, in windows of {result['seq_len']} tokens")
    if result["rejected"]:
        lines.append("rejected: " + ", ".join(f"{rule} {n:,}" for rule, n in result["rejected"].items()))
    if found := result.get("references"):
        lines.append(
            f"reference points: {found['documents']:,} documents, {found['bytes']:,} bytes of {', '.join(found['data'])}"
        )
        if found["known"]:
            lines.append(f"warning: {found['known']:,} of the scored documents are in that training text")
    return lines


def paired(results: list[dict]) -> list[Measure]:
    """The models' bits and bytes of each document, and the reference points; see comparison.py."""
    of_models = [result["documents"] for result in results]
    measures: list[Measure] = [
        Paired(
            "bits per byte",
            [one["group"] for one in of_models[0]],
            np.array([[one["bits"] for one in scored] for scored in of_models], float),
            np.array([[one["bytes"] for one in scored] for scored in of_models], float),
            lower_is_better=True,
        )
    ]
    for name, values in results[0].get("references", {}).get("bits_per_byte", {}).items():
        measures.append(Plain(f"{name}", "", [values[""]] * len(results)))
    return measures


def side_by_side(results: list[dict]) -> list[dict]:
    """The documents of which the models' bits per byte differ most, see reporting/compare_page.py."""
    of_models = [result["documents"] for result in results]
    bits_MN = np.array([[one["bits"] for one in scored] for scored in of_models], float)
    bytes_MN = np.array([[one["bytes"] for one in scored] for scored in of_models], float)
    per_byte_MN = ratio(bits_MN, bytes_MN)
    items = []
    for i in np.argsort(-np.ptp(per_byte_MN, axis=0), stable=True)[:SHOWN].tolist() if len(results) > 1 else []:
        cells = [[{"text": f"{value:.4f}", "note": ""}] for value in per_byte_MN[:, i]]
        one = of_models[0][i]
        items.append({"turns": [(one["group"], f"{one['place']}, {one['bytes']:,} bytes")], "cells": cells})
    title = {"title": "Documents that differ most", "chinese": "差别最大的文档", "note": "bits per byte"}
    return [title | {"items": items}] if items else []
