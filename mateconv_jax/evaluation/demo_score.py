"""The score of a model trained on the demo corpus: grammar of sampled stories, and facts answered in chat."""

from collections.abc import Callable

from mateconv_jax.data import demo
from mateconv_jax.generation_config import GenerationConfig
from mateconv_jax.inference.text_generator import TextGenerator

STORIES = 8  # sampled per story opening: about 400 sentences in total


def evaluator(args) -> Callable[[str], dict]:
    """Of the command line; see evaluate.py."""
    return lambda path: score_demo(TextGenerator.from_pretrained(path, args.tokenizer, args.use_ema, args.dtype))


def score_demo(generator) -> dict[str, float]:
    """Score a TextGenerator that was trained on the demo corpus.

    Returns:
      A dict. grammar: fraction of sentences that follow the corpus's grammar, in stories sampled at temperature 0.8 without
      filters; sentences: their number. Fractions of questions answered correctly in chat: facts, in the wordings that
      dialogues have for that fact; other_wordings, in those that they have only for other facts; texts_alone, about facts
      that only texts state. questions, other_wordings_questions, texts_alone_questions: their numbers. short: fraction of all
      these questions that got the right short answer, as the corpus's preferences have it; it counts as correct above.
    """
    config = GenerationConfig(temperature=0.8, top_k=0, top_p=1.0, max_new_tokens=110)
    stories = [time + text for time in demo.TIMES for text in generator.generate_samples(time, STORIES, config)]
    sentences = [sentence for story in stories for sentence in demo.sentences(story)]
    scores = {
        "grammar": sum(map(demo.is_sentence, sentences)) / max(len(sentences), 1),
        "sentences": len(sentences),
    }
    asked = {name: list(pairs) for name, pairs in _questions().items()}
    histories = [[{"role": "user", "content": question}] for pairs in asked.values() for question, _ in pairs]
    answers = iter(generator.batch_chat(histories, GenerationConfig(do_sample=False, max_new_tokens=40)))
    n_short = 0
    for name, pairs in asked.items():
        said = [(next(answers), fact) for _, fact in pairs]
        short = [answer == demo.short_answer(fact) for answer, fact in said]
        correct = [is_short or answer == demo.statement(fact) for is_short, (answer, fact) in zip(short, said, strict=True)]
        scores[name] = sum(correct) / len(correct)
        scores["questions" if name == "facts" else f"{name}_questions"] = len(correct)
        n_short += sum(short)
    return scores | {"short": n_short / len(histories)}


def print_result(score: dict[str, float]) -> None:
    print(f"grammar: {score['grammar']:.1%} of {score['sentences']} sampled sentences follow the demo corpus's grammar")
    print(f"facts:   {score['facts']:.1%} of {score['questions']} questions that dialogues ask are answered correctly")
    others, texts = score["other_wordings_questions"], score["texts_alone_questions"]
    print(f"         {score['other_wordings']:.1%} of {others} in wordings that they have only for other facts")
    print(f"         {score['texts_alone']:.1%} of {texts} about facts that only texts state")
    if score["short"]:
        print(f"         {score['short']:.1%} of all of them with the bare answer, as the demo's preferences have it")


def _questions() -> dict[str, list[tuple[str, tuple]]]:
    """{score: [(question, fact), …]}"""
    in_dialogues = [fact for fact in demo.FACTS if demo.is_in_dialogues(fact)]
    others = [fact for fact in demo.FACTS if not demo.is_in_dialogues(fact)]
    return {
        "facts": [(q, fact) for fact in in_dialogues for q in demo.questions(fact) if q != demo.withheld_question(fact)],
        "other_wordings": [(demo.withheld_question(fact), fact) for fact in in_dialogues],
        "texts_alone": [(q, fact) for fact in others for q in demo.questions(fact)],
    }
