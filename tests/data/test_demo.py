import itertools
import json

from mateconv_jax.data import demo


def texts(document):
    return [document["text"]] if "text" in document else [message["content"] for message in document["messages"]]


def test_every_sentence_of_the_corpus_belongs_to_its_grammar_and_they_are_many():
    defaults = demo.parse_args(["--output", "x"])
    documents = list(demo.corpus(defaults.documents, defaults.seed))
    sentences = {s for document in documents for text in texts(document) for s in demo.sentences(text)}
    assert len(documents) >= 20_000 and len(sentences) >= 20_000
    assert all(map(demo.is_sentence, sentences))
    characters = [sum(map(len, texts(d))) for d in documents]
    assert 0.25 < sum(n for n, d in zip(characters, documents, strict=True) if "messages" in d) / sum(characters) < 0.6


def test_what_is_not_in_the_grammar_is_refused():
    good = ["小明看见两只白色的小猫在睡觉。", "法国的首都是巴黎。", "请问《春晓》是谁写的？", "天慢慢黑了，老王点亮了灯。"]
    assert all(map(demo.is_sentence, good))
    bad = [
        "法国的首都是伦敦。", "小明看见两条白色的小猫在睡觉。", "小明去公园看书。", "今天早上，小明去公园看书。", "小明看见小猫",
        "法国的首都是巴黎", "天慢慢黑了，老王撑开了雨伞。", "", "。",
    ]  # fmt: skip
    assert not any(map(demo.is_sentence, bad))


def test_the_seed_decides():
    def first(seed):
        return json.dumps(list(itertools.islice(demo.corpus(50, seed), 50)))

    assert first(1) == first(1) != first(2)


def test_the_facts_are_a_few_dozen_and_each_is_asked_in_three_ways():
    assert len(demo.FACTS) == 36
    assert len({question for fact in demo.FACTS for question in demo.questions(fact)}) == 3 * 36


def test_sentences_keep_what_follows_the_last_mark():
    assert demo.sentences("一。二？三") == ["一。", "二？", "三"]
