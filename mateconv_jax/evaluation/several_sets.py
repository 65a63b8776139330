"""Scores on several sets of text, and their weighted mean."""

import functools
import math
from collections.abc import Callable

from mateconv_jax import weighted_paths
from mateconv_jax.data.mixture import names
from mateconv_jax.evaluation.documents import is_prepared


def each(evaluate: Callable[..., dict]) -> Callable[..., dict]:
    """evaluate(model_path, data, …) of held_out.py, for data that may be several sets.

    Several are "PATH:WEIGHT,PATH:WEIGHT" as in data.train_data_path, or several datasets, which then weigh the same. Several
    raw files without weights are one set.

    Returns:
      For one set what `evaluate` returns. Otherwise a dict: model_path, step, data; sets, {name: what `evaluate` returns, and
      weight}; and scores, the weighted means of loss and bits per byte, and the perplexity of that loss. None where a set has
      None.
    """

    @functools.wraps(evaluate)
    def evaluate_each(model_path, data: list[str], *args, **options) -> dict:
        is_weighted = any(map(weighted_paths.has_weights, data))
        if not is_weighted and not (len(data) > 1 and is_prepared(data)):
            return evaluate(model_path, data, *args, **options)
        paths = weighted_paths.parse(",".join(data if is_weighted else [f"{path}:1" for path in data]), "--data")
        total = sum(weight for _, weight in paths)
        sets = {
            name: evaluate(model_path, [path], *args, **options) | {"weight": float(weight / total)}
            for name, (path, weight) in zip(names([path for path, _ in paths]), paths, strict=True)
        }
        step = next(iter(sets.values()))["step"]
        return {"model_path": str(model_path), "step": step, "data": data, "sets": sets, "scores": _means(list(sets.values()))}

    return evaluate_each


def _means(results: list[dict]) -> dict[str, dict[str, float | None]]:
    means = {}
    for weights in results[0]["scores"]:

        def mean(name: str, weights=weights) -> float | None:
            values = [result["scores"][weights][name] for result in results]
            return None if None in values else sum(r["weight"] * value for r, value in zip(results, values, strict=True))

        loss = mean("loss")
        perplexity = None if loss is None or loss > 700 else math.exp(loss)
        means[weights] = {"loss": loss, "perplexity": perplexity, "bits_per_byte": mean("bits_per_byte")}
    return means
