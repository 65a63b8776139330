"""How well a model learned the demo corpus."""

from mateconv_jax.data import demo
from mateconv_jax.inference.generation_config import GenerationConfig

STORIES = 8  # sampled from each way a story can begin: about 400 sentences in all


def score_demo(generator) -> dict[str, float]:
    """Score a TextGenerator that was trained on the demo corpus.

    Returns:
      grammar: share of the sentences of stories, sampled at temperature 0.8 from the whole distribution, that belong to the
      corpus's grammar; facts: share of the facts that come back right when asked in chat, each in one of its three wordings.
    """
    config = GenerationConfig(temperature=0.8, top_k=0, top_p=1.0, max_new_tokens=110)
    stories = [time + text for time in demo.TIMES for text in generator.generate_samples(time, STORIES, config)]
    sentences = [sentence for story in stories for sentence in demo.sentences(story)]
    asked = [demo.questions(fact)[i % 3] for i, fact in enumerate(demo.FACTS)]
    answers = generator.batch_chat(
        [[{"role": "user", "content": question}] for question in asked], GenerationConfig(do_sample=False, max_new_tokens=40)
    )
    right = [answer == demo.statement(fact) for answer, fact in zip(answers, demo.FACTS, strict=True)]
    return {
        "grammar": sum(map(demo.is_sentence, sentences)) / max(len(sentences), 1),
        "sentences": len(sentences),
        "facts": sum(right) / len(right),
        "questions": len(right),
    }
