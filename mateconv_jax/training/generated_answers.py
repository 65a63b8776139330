"""Answers that a model writes to a task's questions, checked by functions."""

import math
import re

from mateconv_jax.generation_config import GenerationConfig
from mateconv_jax.inference.text_generator import TextGenerator
from mateconv_jax.tasks.benchmark import AskOptions
from mateconv_jax.tasks.prompts import BETWEEN, prompts
from mateconv_jax.tasks.questions import Task
from mateconv_jax.training.rewards import Rewards

# A model that has learned no end of an answer goes on with the next question.
STOP = (BETWEEN, "\nQuestion:", "\n问题：")
PLAIN_NUMBER = re.compile(r"(.*####)?\s*-?[\d,，]*\.?\d+\s*", re.DOTALL)  # GSM8K ends its solutions with "#### 42"


def default_check(task: Task) -> str:
    """The function of mateconv_jax.rewards that suits a task's answers: number_match where all of them are numbers,
    pattern_match where they are patterns, otherwise exact_match.
    """
    records = [question.record for question in task.questions]
    if any("pattern" in record and "answer" not in record for record in records):
        return "mateconv_jax.rewards:pattern_match"
    are_numbers = all(PLAIN_NUMBER.fullmatch(str(record.get("answer", ""))) for record in records)
    return f"mateconv_jax.rewards:{'number_match' if are_numbers else 'exact_match'}"


def answer_records(
    generator: TextGenerator, task: Task, rewards: Rewards, options: AskOptions, max_new_tokens: int
) -> list[dict]:
    """One for each question: id, subject, truncated, text (the likeliest answer), and for each function its reward; None: it
    gave none.

    Raises:
      UserError: too few examples; a dialogue for a tokenizer without a chat template.
    """
    asked = prompts(task, options.n_shots, options.score, options.chat, options.shots_key)
    contexts = [prompt.context for prompt in asked]
    stop = STOP if all(isinstance(context, str) for context in contexts) else ()
    how = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, truncate_prompt=True, stop=stop)
    answers = generator.batch_answer(contexts, how, 128)
    reward_FN = rewards.of(contexts, answers, [prompt.question.record for prompt in asked])
    found = []
    for prompt, answer, reward_F in zip(asked, answers, reward_FN.T.tolist(), strict=True):
        context = prompt.context
        n_tokens = len(generator.document_ids(context)) if isinstance(context, str) else generator.n_chat_tokens(context)
        of_functions = {
            name: None if math.isnan(reward) else reward for name, reward in zip(rewards.names, reward_F, strict=True)
        }
        record = {"id": prompt.question.id, "subject": prompt.question.subject, "text": str(answer)}
        found.append(record | {"truncated": n_tokens > answer.n_prompt_tokens} | of_functions)
    return found
