"""What a model says to fixed prompts: does it repeat itself, come to an end, write whole characters?

All measures are over characters, not tokens, so that models with different tokenizers can be compared.
"""

import dataclasses
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from tqdm import tqdm

from mateconv_jax.errors import UserError
from mateconv_jax.evaluation.comparison import EVERYTHING, Measure, Paired, Plain
from mateconv_jax.evaluation.table import print_numbers
from mateconv_jax.generation_config import GenerationConfig
from mateconv_jax.inference.batch_file import read_requests
from mateconv_jax.inference.text_generator import Generation, History, TextGenerator

BATCH_SIZE = 16
GRAM = 4  # characters of the n-grams of which a repetition is counted
DISTINCT = (1, 2, 3)
NOT_SET = ("use_cache", "stop", "logit_bias")
SHOWN = ("temperature", "top_k", "top_p", "max_new_tokens", "seed")  # of the settings
TEXTS, DIALOGUES = "texts", "dialogues"

OPENINGS = (
    "春天到了，", "从前有一座山，", "今天早上，小明", "长江是", "人工智能", "秋天的夜晚，月亮", "他推开门，", "中国的首都",
    "做一碗西红柿鸡蛋面，首先", "很久以前，在一片森林里，", "学习一门新的语言", "雨下了整整一夜。", "这座城市最有名的地方是",
    "妈妈对我说：“", "在物理学中，", "窗外的风轻轻地吹，", "公司昨天宣布，", "老师走进教室，",
)  # fmt: skip
QUESTIONS = (
    "你好！", "中国的首都是哪里？", "请介绍一下你自己。", "一年有几个季节？", "为什么天空是蓝色的？",
    "请写一首关于秋天的小诗。", "三加五等于几？", "怎样才能睡得更好？", "请推荐一种适合初学者的运动。",
    "猫和狗有什么不同？", "请用一句话解释什么是重力。", "早饭吃什么比较健康？", "把“我喜欢读书”翻译成英文。",
    "给我讲一个简短的故事。", "地球绕着什么转？", "请列出三种水果。",
)  # fmt: skip
FOLLOW_UPS = (
    ("我想去旅行。", "好主意！您想去山里还是海边？", "海边。有什么要注意的？"),
    ("水在多少度结冰？", "在标准大气压下，水在零摄氏度结冰。", "那么多少度沸腾？"),
)


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
      text: without a character that the limit cut off.
      ended: whether the model ended it, not a limit.
      is_whole: whether it is valid UTF-8.
    """

    text: str
    n_tokens: int
    ended: bool
    is_whole: bool

    @staticmethod
    def of(generation: Generation) -> "Answer":
        ended = generation.finish_reason == "eos"
        text = str(generation) if ended else generation.rstrip("\ufffd")  # what decoding makes of bytes that are no character
        return Answer(text, len(generation.token_ids), ended, "\ufffd" not in text)


def evaluator(args) -> Callable[[str], dict]:
    """Of the command line; see evaluate.py."""
    n_samples = 2 if args.num_samples is None else args.num_samples
    if n_samples < 1:
        raise UserError(f"--num_samples: {n_samples} is invalid (expected at least 1)")
    config = GenerationConfig(
        max_new_tokens=128 if args.max_new_tokens is None else args.max_new_tokens,
        seed=0 if args.seed is None else args.seed,
        temperature=0.8 if args.temperature is None else args.temperature,
    )
    prompts = read_prompts(args.says)

    def evaluate(path: str) -> dict:
        generator = TextGenerator.from_pretrained(path, args.tokenizer, args.use_ema, args.dtype)
        return {"model_path": path, "file": args.says or None} | says(generator, prompts, config, n_samples)

    return evaluate


def read_prompts(path: str) -> list[str | History]:
    """Texts to continue and dialogues to answer, of a file as for `sample --batch_file`; the built-in ones for "".

    Raises:
      UserError: the file cannot be read or holds no prompt, or a line is malformed.
    """
    if path:
        try:
            requests = read_requests(path)
        except UserError as error:
            raise UserError(str(error).replace("--batch_file:", "--says:")) from error
        for request in requests:
            if own := {"seed", "num_samples"} & request.record.keys():
                raise UserError(f"--says: {request.location} has its own {min(own)!r} (expected --{min(own)}, for all prompts)")
        return [request.document for request in requests]
    roles = ("user", "assistant", "user")
    turns = [*((question,) for question in QUESTIONS), *FOLLOW_UPS]
    return [
        *OPENINGS,
        *([{"role": role, "content": said} for role, said in zip(roles, turn, strict=False)] for turn in turns),
    ]


def says(generator: TextGenerator, prompts: Sequence[str | History], config: GenerationConfig, n_samples: int) -> dict:
    """Let a model answer prompts and measure its answers.

    Args:
      config: its seed and settings; sample i of a prompt is what `TextGenerator.generate_samples` gives at i.

    Returns:
      A dict: settings; samples, per prompt; left_out, {reason: prompts}; groups, {"", "texts" and/or "dialogues": see
      `measures`}; and answers, [{prompt, group, answers: [{text, n_tokens, ended, is_whole} for each sample], problem}], with
      None in place of the list and a reason where the prompt was left out: it is a dialogue, and the tokenizer has no chat
      template; or it fills the model's context.

    Raises:
      UserError: all prompts were left out.
    """
    problems = [_problem(generator, prompt) for prompt in prompts]
    asked = [i for i, problem in enumerate(problems) if problem is None]
    if not asked:
        raise UserError(f"--says: the model can be asked none of the prompts ({problems[0]})")
    requests = [(prompts[i], (config.seed, sample)) for i in asked for sample in range(n_samples)]
    bar = tqdm(total=len(requests), desc="answering", unit="answer", dynamic_ncols=True, disable=not sys.stderr.isatty())
    answers: list[Answer] = []
    with bar:
        for start in range(0, len(requests), BATCH_SIZE):
            documents, draws = map(list, zip(*requests[start : start + BATCH_SIZE], strict=True))
            answers += map(Answer.of, generator.batch_answer(documents, config, BATCH_SIZE, draws))
            bar.update(len(documents))
    of_prompt: list[list[Answer] | None] = [None] * len(prompts)
    for i, start in zip(asked, range(0, len(answers), n_samples), strict=True):
        of_prompt[i] = answers[start : start + n_samples]
    return {
        "settings": {name: value for name, value in dataclasses.asdict(config).items() if name not in NOT_SET},
        "samples": n_samples,
        "left_out": dict(Counter(filter(None, problems))),
        "groups": _by_group(prompts, of_prompt),
        "answers": [
            {
                "prompt": prompt,
                "group": group_of(prompt),
                "answers": None if given is None else [dataclasses.asdict(answer) for answer in given],
                "problem": problem,
            }
            for prompt, given, problem in zip(prompts, of_prompt, problems, strict=True)
        ],
    }


def group_of(prompt: str | History) -> str:
    return TEXTS if isinstance(prompt, str) else DIALOGUES


def _problem(generator: TextGenerator, prompt: str | History) -> str | None:
    """Why the model cannot be asked this; None: it can."""
    if isinstance(prompt, str):
        n_tokens = len(generator.document_ids(prompt))
    elif not generator.tokenizer.chat_template:
        return "no chat template"
    else:
        n_tokens = generator.n_chat_tokens(prompt)
    return None if n_tokens < generator.max_seq_len else "longer than the context"


def _by_group(prompts: Sequence[str | History], of_prompt: list[list[Answer] | None]) -> dict[str, dict]:
    found: dict[str, list[Answer]] = {EVERYTHING: []}
    for prompt, answers in zip(prompts, of_prompt, strict=True):
        for group in (EVERYTHING, group_of(prompt)) if answers is not None else ():
            found.setdefault(group, []).extend(answers or [])
    return {group: measures(answers) for group, answers in found.items()}


# ---- measures -----------------------------------------------------------------------------------------------------


def measures(answers: Sequence[Answer]) -> dict[str, float | None]:
    """Of at least one answer.

    Returns:
      A dict: answers, their number; repetition: the mean share of an answer's 4-grams that occurred in it before (seq-rep-4 of
      Welleck et al., 2020); distinct_1, _2 and _3: distinct n-grams of all answers over all n-grams (Li et al., 2016), which
      falls with their length; ends: share that the model ended; valid_utf8: share without bytes that are no character, but for
      one that the limit cut off; characters and tokens: mean lengths.
    """
    texts = [answer.text for answer in answers]
    grams = {n: [gram for text in texts for gram in ngrams(text, n)] for n in DISTINCT}
    return {
        "answers": len(answers),
        "repetition": float(np.mean([repetition(text) for text in texts])),
        **{f"distinct_{n}": len(set(found)) / len(found) if found else None for n, found in grams.items()},
        "ends": float(np.mean([answer.ended for answer in answers])),
        "valid_utf8": float(np.mean([answer.is_whole for answer in answers])),
        "characters": float(np.mean([len(text) for text in texts])),
        "tokens": float(np.mean([answer.n_tokens for answer in answers])),
    }


def ngrams(text: str, n: int) -> list[str]:
    return [text[i : i + n] for i in range(len(text) - n + 1)]


def repetition(text: str) -> float:
    """Share of a text's n-grams of GRAM characters that occurred in it before; 0 where it has none."""
    grams = ngrams(text, GRAM)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


# ---- what is shown ------------------------------------------------------------------------------------------------


COLUMNS = {  # heading, how it is written
    "answers": ("answers", ",d"),
    "repetition": ("repeated 4-grams", ".1%"),
    **{f"distinct_{n}": (f"distinct-{n}", ".1%") for n in DISTINCT},
    "ends": ("ends by itself", ".1%"),
    "valid_utf8": ("valid UTF-8", ".1%"),
    "characters": ("characters", ".1f"),
    "tokens": ("tokens", ".1f"),
}


def print_result(result: dict) -> None:
    """Print a result of `evaluator` to standard output."""
    rows = {}
    for group, scores in result["groups"].items():
        values = [(scores[name], form) for name, (_, form) in COLUMNS.items()]
        rows[group or "all"] = ["-" if value is None else f"{value:{form}}" for value, form in values]
    print_numbers(described(result), "", [heading for heading, _ in COLUMNS.values()], rows)
    print("--json prints the answers, --output=answers.html writes them as a page")


def described(result: dict) -> list[str]:
    """Lines on the model, what it was asked, and how answers were sampled."""
    settings, n_prompts = result["settings"], sum(item["answers"] is not None for item in result["answers"])
    prompts = f"{n_prompts} {'built-in prompts' if result['file'] is None else 'prompts of ' + result['file']}"
    lines = [result["model_path"], f"{prompts}, {result['samples']} answers to each"]
    lines.append(", ".join(f"{name} {settings[name]}" for name in SHOWN))
    lines += [f"{n} prompts left out: {reason}" for reason, n in result["left_out"].items()]
    return lines


def paired(results: list[dict]) -> list[Measure]:
    """The models' measures of each prompt, see comparison.py. distinct-n is of all answers together, and has no interval."""

    def of_prompts(measure: Callable[[dict], float]) -> np.ndarray:
        return np.array([[_mean(item["answers"], measure) for item in result["answers"]] for result in results])

    groups = [item["group"] for item in results[0]["answers"]]
    measured = [
        Paired("repeated 4-grams", groups, of_prompts(lambda answer: repetition(answer["text"])), None, True, ".1%", "prompts"),
        Paired("ends by itself", groups, of_prompts(lambda answer: answer["ended"]), None, None, ".1%", "prompts"),
        Paired("valid UTF-8", groups, of_prompts(lambda answer: answer["is_whole"]), None, False, ".1%", "prompts"),
        Paired("characters", groups, of_prompts(lambda answer: len(answer["text"])), None, None, ".1f", "prompts"),
    ]
    distinct = [
        Plain(f"distinct-{n}", group, [result["groups"].get(group, {}).get(f"distinct_{n}") for result in results], ".1%")
        for n in DISTINCT
        for group in results[0]["groups"]
    ]
    return [*measured, *distinct]


def _mean(answers: list[dict] | None, measure: Callable[[dict], float]) -> float:
    return math.nan if answers is None else float(np.mean([measure(answer) for answer in answers]))


def side_by_side(results: list[dict]) -> list[dict]:
    """The answers, see reporting/compare_page.py."""
    items = []
    for of_models in zip(*(result["answers"] for result in results), strict=True):
        prompt = of_models[0]["prompt"]
        turns = [("", prompt)] if isinstance(prompt, str) else [(turn["role"], turn["content"]) for turn in prompt]
        items.append({"turns": turns, "cells": [_cells(item) for item in of_models]})
    return [{"title": "Answers", "chinese": "回答", "note": "", "items": items}]


def _cells(item: dict) -> list[dict]:
    if item["answers"] is None:
        return [{"text": "", "note": item["problem"]}]

    def about(answer: dict) -> str:
        return f"{len(answer['text'])} characters, {'ended' if answer['ended'] else 'cut off'}"

    return [{"text": answer["text"], "note": about(answer)} for answer in item["answers"]]
