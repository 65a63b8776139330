"""How reward functions score a model's answers to prompts."""

from collections.abc import Callable

import numpy as np

from mateconv_jax.data.prompts import read_prompts
from mateconv_jax.generation_config import GenerationConfig
from mateconv_jax.inference.text_generator import TextGenerator
from mateconv_jax.training.rewards import Rewards


def evaluator(args) -> Callable[[str], dict]:
    """Of the command line; see evaluate.py."""

    def evaluate(path: str) -> dict:
        generator = TextGenerator.from_pretrained(path, args.tokenizer, args.use_ema, args.dtype)
        return score_prompts(generator, args.prompts, args.reward, args.max_new_tokens or 64)

    return evaluate


def score_prompts(generator, path: str, functions: list[str], max_new_tokens: int) -> dict[str, float]:
    """Mean reward of a TextGenerator's likeliest answers to the prompts of a JSONL file, see data/prompts.py.

    Args:
      functions: as in the config's reward.functions.

    Returns:
      prompts, how many; unrewarded, answers that a function gave no reward; and each function's mean, over those it gave one.

    Raises:
      UserError: the file holds no prompt, or a function is not found.
    """
    rewards = Rewards(tuple(functions), (), 8)
    prompts = read_prompts(path, "--prompts", generator.tokenizer, generator.max_seq_len - max_new_tokens)
    how = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens)
    answers = generator.batch_answer(prompts.prompts, how, 128)
    reward_FN = rewards.of(prompts.prompts, answers, prompts.records)
    means = {name: float(np.nanmean(reward_N)) for name, reward_N in zip(rewards.names, reward_FN, strict=True)}
    return {"prompts": prompts.n_prompts, "unrewarded": int(np.isnan(reward_FN).any(axis=0).sum())} | means


def print_result(score: dict[str, float]) -> None:
    unrewarded = f" ({score['unrewarded']} without a reward)" * (score["unrewarded"] > 0)
    print(f"answers to {score['prompts']:,} prompts{unrewarded}")
    for name in list(score)[2:]:
        print(f"{name:16} {score[name]:.4f}")
