import itertools
import json

from mateconv_jax.data import demo


def test_every_sentence_of_the_corpus_belongs_to_its_grammar_and_they_are_many():
    defaults = demo.parse_args(["--output", "x"])
    documents = list(demo.corpus(defaults.documents, defaults.seed))
    sentences = {s for document in documents for s in demo.sentences(document["text"])}
    assert len(documents) >= 20_000 and len(sentences) >= 10_000
    assert all(map(demo.is_sentence, sentences))
    assert {demo.statement(fact) for fact in demo.FACTS} <= sentences


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
        return json.dumps(list(itertools.islice(demo.corpus(50, seed, "mixed"), 50)))

    assert first(1) == first(1) != first(2)


def test_dialogues_withhold_some_facts_and_a_wording_of_each():
    messages = [document["messages"] for document in demo.corpus(8000, 0, "dialogues")]
    asked = {turn["content"] for dialogue in messages for turn in dialogue if turn["role"] == "user"}
    said = {turn["content"] for dialogue in messages for turn in dialogue if turn["role"] == "assistant"}
    withheld = [fact for fact in demo.FACTS if not demo.is_in_dialogues(fact)]
    assert len(demo.FACTS) == 92 and len(withheld) == 9
    assert not said & {demo.statement(fact) for fact in withheld}
    for fact in demo.FACTS:
        expected = set() if fact in withheld else {*demo.questions(fact)} - {demo.withheld_question(fact)}
        assert asked & {*demo.questions(fact)} == expected and len(set(demo.questions(fact))) == 3
    # Each wording is heard about other facts, and of each withheld fact's subject two others are known.
    for kind, (_, wordings, answers) in demo.KINDS.items():
        assert all(any(wording.format(subject) in asked for subject in answers) for wording in wordings), kind


def test_sentences_keep_what_follows_the_last_mark():
    assert demo.sentences("一。二？三") == ["一。", "二？", "三"]


def test_preferences_ask_as_dialogues_do_and_prefer_the_bare_answer():
    preferences = list(demo.corpus(3000, 0, "preferences"))
    asked_in_dialogues = {turn["content"] for document in demo.corpus(8000, 0, "dialogues") for turn in document["messages"]}
    facts = {question: fact for fact in demo.FACTS for question in demo.questions(fact)}
    for document in preferences:
        *prompt, chosen = document["chosen"]
        assert document["rejected"][:-1] == prompt and prompt[-1]["content"] in asked_in_dialogues
        fact = facts[prompt[-1]["content"]]
        assert chosen["content"] == demo.short_answer(fact) in demo.statement(fact)
        assert document["rejected"][-1]["content"] == demo.statement(fact)
    assert len({json.dumps(document) for document in preferences}) > 1500
