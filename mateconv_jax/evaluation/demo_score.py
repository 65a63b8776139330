"""The score of a model trained on the demo corpus: grammar of sampled stories, and facts answered in chat."""

from mateconv_jax.data import demo
from mateconv_jax.generation_config import GenerationConfig

STORIES = 8  # sampled per story opening: about 400 sentences in total


def score_demo(generator) -> dict[str, float]:
    """Score a TextGenerator that was trained on the demo corpus.

    Returns:
      A dict. grammar: fraction of sentences that follow the corpus's grammar, in stories sampled at temperature 0.8 without
      filters; sentences: their number; facts: fraction of facts answered correctly in chat, each asked in one of its three
      wordings; questions: their number.
    """
    config = GenerationConfig(temperature=0.8, top_k=0, top_p=1.0, max_new_tokens=110)
    stories = [time + text for time in demo.TIMES for text in generator.generate_samples(time, STORIES, config)]
    sentences = [sentence for story in stories for sentence in demo.sentences(story)]
    questions = [demo.questions(fact)[i % 3] for i, fact in enumerate(demo.FACTS)]
    greedy = GenerationConfig(do_sample=False, max_new_tokens=40)
    answers = generator.batch_chat([[{"role": "user", "content": question}] for question in questions], greedy)
    correct = [answer == demo.statement(fact) for answer, fact in zip(answers, demo.FACTS, strict=True)]
    return {
        "grammar": sum(map(demo.is_sentence, sentences)) / max(len(sentences), 1),
        "sentences": len(sentences),
        "facts": sum(correct) / len(correct),
        "questions": len(correct),
    }
