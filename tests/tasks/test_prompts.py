"""Prompts as lm_eval's tasks write them: see its tasks/ceval, cmmlu, mmlu and arc."""

import re
from types import SimpleNamespace

import pytest

from mateconv_jax.data.tokenizer import tokenizer as tokenizer_lib
from mateconv_jax.data.tokenizer.chat import encode_chat
from mateconv_jax.errors import UserError
from mateconv_jax.tasks.encoding import encode
from mateconv_jax.tasks.files import read_tasks
from mateconv_jax.tasks.prompts import prompts
from tests.tasks import exams


def asked(path, n_shots=0, score="letters", chat=False):
    [task] = read_tasks([str(path)], "--tasks")
    return prompts(task, n_shots, score, chat, "--shots")


def test_an_exam_by_its_letters(tmp_path):
    prompt = asked(exams.ceval(tmp_path / "ceval"))[2]
    assert prompt.context == (
        "以下是中国关于法学的单项选择题，请选出其中的正确答案。\n\n"
        "红灯亮时，行人应当\n停下，还是\nA. 快跑\nB. 慢走\nC. 停下\nD. 唱歌\n答案："
    )
    assert prompt.answers == (" A", " B", " C", " D") and prompt.choices == ("A", "B", "C", "D")
    assert asked(exams.cmmlu(tmp_path / "cmmlu"))[0].context.startswith(
        "以下是关于农学的单项选择题，请直接给出正确答案的选项。\n\n小明"
    )


def test_examples_come_first(tmp_path):
    context = asked(exams.ceval(tmp_path / "ceval"), n_shots=2)[3].context
    example = "第{}个例子，选{}：\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n答案： {}\n\n"
    start = (
        "以下是中国关于逻辑学的单项选择题，请选出其中的正确答案。\n\n"
        + example.format(0, "A", "A")
        + example.format(1, "B", "B")
    )
    assert context.startswith(start + "甲比乙高，乙比丙高，那么最高的是\nA. 甲")  # the question's own white space is gone
    with pytest.raises(UserError, match=r"--shots: 6, but there are 5 examples of 'law' \(looked for .*law_dev.csv or"):
        asked(tmp_path / "ceval", n_shots=6)


def test_the_texts_of_choices(tmp_path):
    prompt = asked(exams.ceval(tmp_path / "ceval"), 1, "texts")[0]
    assert prompt.context == "问题：第0个例子，选A：\n答案：甲\n\n问题：小明把书还给了图书馆，这是\n答案："
    assert prompt.answers == prompt.choices == ("履行义务", "行使权利", "违反合同", "无因管理")
    arc = {"question": "What is hot?", "choices": {"text": ["fire", "ice"], "label": ["A", "B"]}, "answerKey": "A"}
    prompt = asked(exams.jsonl(tmp_path / "arc.jsonl", [arc]), score="texts")[0]
    assert (prompt.context, prompt.answers) == ("Question: What is hot?\nAnswer:", (" fire", " ice"))
    mmlu = {"question": "What is hot?", "choices": ["fire", "ice"], "answer": 0, "subject": "high_school_physics"}
    assert asked(exams.jsonl(tmp_path / "mmlu.jsonl", [mmlu]))[0].context == (
        "The following are multiple choice questions (with answers) about high school physics.\n\n"
        "What is hot?\nA. fire\nB. ice\nAnswer:"
    )
    exams.jsonl(tmp_path / "empty.jsonl", [{"question": "x", "choices": ["", "y"], "answer": 1}])
    with pytest.raises(UserError, match="empty.jsonl:1: an empty choice cannot be scored by its text"):
        asked(tmp_path / "empty.jsonl", score="texts")
    assert len(asked(tmp_path / "empty.jsonl")[0].answers) == 2


def test_other_kinds(tmp_path):
    cloze = {"text": "他把____吃了。", "choices": ["苹果", "天空"], "answer": 0}
    exams.jsonl(tmp_path / "cloze_dev.jsonl", [cloze])
    prompt = asked(exams.jsonl(tmp_path / "cloze.jsonl", [cloze]), 1)[0]
    assert (prompt.context, prompt.answers) == ("他把苹果吃了。\n\n他把", ("苹果吃了。", "天空吃了。"))
    exams.jsonl(tmp_path / "sums_dev.jsonl", [{"question": "1+1=?", "answer": 2}, {"prompt": "1+1=", "answer": 2}])
    lines = [{"question": "2+2=?", "answer": 4}, {"prompt": "2+2=", "answer": 4}]
    question, prompt = asked(exams.jsonl(tmp_path / "sums.jsonl", lines), 2)
    assert question.context == "Question: 1+1=?\nAnswer: 2\n\n1+1= 2\n\nQuestion: 2+2=?\nAnswer:" and question.answers == ()
    assert prompt.context.endswith("\n\n2+2=")


def test_through_the_chat_template(tmp_path):
    prompt = asked(exams.ceval(tmp_path / "ceval"), 1, chat=True)[0]
    assert [message["role"] for message in prompt.context] == ["system", "user", "assistant", "user"]
    assert prompt.context[2]["content"] == "A" and prompt.context[3]["content"].endswith("D. 无因管理\n答案：")
    assert prompt.answers == ("A", "B", "C", "D")
    turns = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "再见"}]
    exams.jsonl(tmp_path / "a.jsonl", [{"messages": turns}])
    assert asked(tmp_path / "a.jsonl")[0].context == turns[:1]


def test_tokens(tmp_path, dataset_folder):
    tokenizer = tokenizer_lib.load(dataset_folder / "tokenizer", "")
    exam = exams.ceval(tmp_path / "ceval")
    prompt = asked(exam)[0]
    ids = tokenizer_lib.encode(tokenizer, [prompt.context, prompt.context + " B"])
    answer = encode(tokenizer, [prompt], 1000)[0][1]
    assert answer.ids.tolist() == [tokenizer.bos_token_id, *ids[1]]
    assert answer.n_answer == len(ids[1]) - len(ids[0]) and not answer.is_truncated
    cut = encode(tokenizer, [prompt], 20)[0][1]
    assert cut.ids.tolist() == answer.ids.tolist()[-21:] and cut.is_truncated and cut.n_answer == answer.n_answer
    messages = asked(exam, chat=True)[0]
    ids = encode_chat(tokenizer, messages.context, add_generation_prompt=True)
    answer = encode(tokenizer, [messages], 1000)[0][0]
    assert answer.ids.tolist() == ids + tokenizer_lib.encode(tokenizer, ["A"])[0]
    assert answer.n_answer == 2  # with the line break behind "assistant"
    exams.jsonl(tmp_path / "a.jsonl", [{"context": "white space ", "continuation": "moves"}])
    [[moved]] = encode(tokenizer, asked(tmp_path / "a.jsonl"), 1000)
    space = tokenizer_lib.encode(tokenizer, ["white space", "white space moves"])
    assert moved.n_answer == len(space[1]) - len(space[0])
    with pytest.raises(UserError, match="ceval/val/law_val.csv:2: an answer has 11 tokens, more than the model's context of 1"):
        encode(tokenizer, asked(exam, score="texts"), 1)


def test_a_token_over_the_edge_of_context_and_answer(tmp_path, monkeypatch):
    """位于欧洲 is one token: all choices count from 位于 on, so that they are compared over the same text."""
    words = ["<s>", "</s>", "中国", "位于欧洲", "位于", "南美洲", "。"]

    def encode_by_words(tokenizer, texts):
        return [[words.index(word) for word in re.findall("|".join(words[2:]), text)] for text in texts]

    monkeypatch.setattr(tokenizer_lib, "encode", encode_by_words)
    exams.jsonl(tmp_path / "a.jsonl", [{"text": "中国位于____。", "choices": ["欧洲", "南美洲"], "answer": 0}])
    tokenizer = SimpleNamespace(bos_token_id=0, eos_token_id=1)
    [[europe, america]] = encode(tokenizer, asked(tmp_path / "a.jsonl"), 10)
    assert (europe.ids.tolist(), europe.n_answer) == ([0, 2, 3, 6], 2)
    assert (america.ids.tolist(), america.n_answer) == ([0, 2, 4, 5, 6], 3)
    exams.jsonl(tmp_path / "b.jsonl", [{"context": "中国位于", "continuation": "欧洲"}])
    [[europe]] = encode(SimpleNamespace(bos_token_id=None, eos_token_id=1), asked(tmp_path / "b.jsonl"), 10)
    assert (europe.ids.tolist(), europe.n_answer) == ([2, 3], 1)
    exams.jsonl(tmp_path / "c.jsonl", [{"context": "位于", "continuation": "欧洲"}])
    [[europe]] = encode(SimpleNamespace(bos_token_id=None, eos_token_id=1), asked(tmp_path / "c.jsonl"), 10)
    assert (europe.ids.tolist(), europe.n_answer) == ([1, 3], 1)  # </s> stands in for the context
