"""What a model says: the measures by hand, and the command."""

import json
import types

import pytest

from mateconv_jax import evaluate
from mateconv_jax.errors import UserError
from mateconv_jax.evaluation import comparison, says
from mateconv_jax.evaluation.says import Answer, measures, repetition
from mateconv_jax.generation_config import GenerationConfig
from mateconv_jax.inference.text_generator import Generation, TextGenerator
from mateconv_jax.reporting import compare_page
from tests import llama


@pytest.fixture(scope="module")
def model(dataset_folder, tmp_path_factory):
    """A Hugging Face folder with random weights."""
    return llama.hugging_face_folder(tmp_path_factory.mktemp("model") / "hf", dataset_folder, 64)


def run(capsys, *arguments):
    evaluate.main(evaluate.parse_args([*map(str, arguments)]))
    return capsys.readouterr().out


def test_measures_by_hand():
    answers = [Answer("一二三四一二三四", 5, True, True), Answer("好", 3, False, False)]
    found = measures(answers)
    assert repetition("一二三四一二三四") == pytest.approx(1 / 5) and repetition("一二三") == 0
    assert found["repetition"] == pytest.approx(0.1)
    assert found["distinct_1"] == pytest.approx(5 / 9) and found["distinct_2"] == pytest.approx(4 / 7)
    assert found["distinct_3"] == pytest.approx(4 / 6)
    assert (found["answers"], found["ends"], found["valid_utf8"]) == (2, 0.5, 0.5)
    assert (found["characters"], found["tokens"]) == (4.5, 4)
    assert measures([Answer("", 0, True, True)])["distinct_1"] is None


@pytest.mark.parametrize(
    "text, reason, expected",
    [
        ("好\ufffd", "length", ("好", True)),  # cut off within a character
        ("好\ufffd", "eos", ("好\ufffd", False)),
        ("\ufffd好", "length", ("\ufffd好", False)),
        ("好", "context", ("好", True)),
    ],
)
def test_a_character_that_the_limit_cut_off_is_no_fault(text, reason, expected):
    answer = Answer.of(Generation(text, [7, 8], 1, reason))
    assert (answer.text, answer.is_whole) == expected and answer.ended == (reason == "eos") and answer.n_tokens == 2


class Scripted:
    """In place of a TextGenerator: a token is a character, and an answer says what was asked and how it was drawn."""

    max_seq_len = 40

    def __init__(self, chat_template="yes"):
        self.tokenizer = types.SimpleNamespace(chat_template=chat_template)

    def document_ids(self, text):
        return list(text)

    def n_chat_tokens(self, history):
        return sum(len(message["content"]) for message in history)

    def batch_answer(self, documents, config, batch_size, draws):
        said = [document if isinstance(document, str) else f"答{document[-1]['content']}" + HOSTILE for document in documents]
        return [
            Generation(f"{text}，{seed}，{sample}", list(text), 1, "eos" if sample else "length")
            for text, (seed, sample) in zip(said, draws, strict=True)
        ]


HOSTILE = "<script>alert(1)</script>"
PROMPTS = ["春天", [{"role": "user", "content": "好吗"}], "长" * 40, *"甲乙丙丁戊己庚"]


def test_each_prompt_has_its_samples_in_order():
    result = says.says(Scripted(), PROMPTS, GenerationConfig(seed=5), 3)
    assert result["left_out"] == {"longer than the context": 1} and result["answers"][2]["answers"] is None
    assert [answer["text"] for answer in result["answers"][9]["answers"]] == ["庚，5，0", "庚，5，1", "庚，5，2"]
    assert (
        result["answers"][1]["answers"][1]["text"] == f"答好吗{HOSTILE}，5，1" and result["answers"][1]["group"] == "dialogues"
    )
    assert {name: group["answers"] for name, group in result["groups"].items()} == {"": 27, "texts": 24, "dialogues": 3}
    assert result["groups"][""]["ends"] == pytest.approx(2 / 3) and result["settings"]["seed"] == 5
    assert json.loads(json.dumps(result)) == result


def test_a_model_without_a_chat_template_is_compared_on_texts_alone(tmp_path, capsys):
    """With the built-in prompts, which fit a context of 40 characters."""
    prompts = says.read_prompts("")
    assert len(prompts) == 36 and all(Scripted.max_seq_len > Scripted().n_chat_tokens(p) for p in prompts[18:34])
    results = [
        {"model_path": path, "file": None} | says.says(generator, prompts, GenerationConfig(), 2)
        for path, generator in (("a", Scripted()), ("b", Scripted(None)))
    ]
    compared = comparison.compare(results, says.paired(results))
    rows = {(row["measure"], row["group"]): row for row in compared["rows"]}
    assert rows["repeated 4-grams", ""]["units"] == 18 and ("repeated 4-grams", "dialogues") not in rows
    assert rows["characters", ""]["differences"] == [{"value": 0, "low": 0, "high": 0, "p": 1}]
    assert rows["distinct-2", "dialogues"]["scores"][1]["value"] is None
    page = compare_page.html(compared, says.side_by_side(results), says.described(results[1])[1:])
    assert all(prompt in page for prompt in (*says.OPENINGS, *says.QUESTIONS))
    assert "18 prompts left out: no chat template" in page and "&lt;script&gt;" in page and "<script" not in page
    comparison.print_comparison(compared)
    says.print_result(results[0])
    printed = capsys.readouterr().out
    assert "temperature 0.8, top_k 50, top_p 0.9, max_new_tokens 100, seed 0" in printed and "50.0%" in printed


@pytest.mark.slow  # 40 s of compiling
def test_answers_are_the_generators_and_reproducible(model, tmp_path, capsys):
    lines = [{"prompt": "小红"}, {"messages": [{"role": "user", "content": "你好"}]}, {"prompt": "长"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ("--model_path", model, "--says", tmp_path / "p.jsonl", "--max_new_tokens", 12, "--seed", 5, "--num_samples", 3)
    result = json.loads(run(capsys, *arguments, "--json").splitlines()[-1])
    generator = TextGenerator.from_pretrained(model)
    config = GenerationConfig(max_new_tokens=12, seed=5)
    samples = generator.generate_samples("小红", 3, config)
    assert [answer["text"] for answer in result["answers"][0]["answers"]] == [Answer.of(sample).text for sample in samples]
    chat = generator.chat(lines[1]["messages"], config)
    assert result["answers"][1]["answers"][0]["text"] == Answer.of(chat).text
    page = tmp_path / "c.html"
    both = json.loads(run(capsys, *arguments, "--model_path", model, "--output", page, "--json").splitlines()[-1])
    assert both["models"] == [result, result] and "小红" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "line, message",
    [
        ("", "no prompt in"),
        ('{"prompt": "a", "seed": 3}', r"p.jsonl:1 has its own 'seed' \(expected --seed"),
        ('{"prompt": 3}', r"p.jsonl:1: 'prompt' is 3"),
    ],
)
def test_a_file_that_does_not_fit(tmp_path, line, message):
    (tmp_path / "p.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=f"^--says: .*{message}"):
        says.read_prompts(str(tmp_path / "p.jsonl"))


def test_nothing_that_can_be_asked():
    with pytest.raises(UserError, match=r"--says: the model can be asked none of the prompts \(longer than the context\)"):
        says.says(Scripted(), ["长" * 80], GenerationConfig(), 1)
