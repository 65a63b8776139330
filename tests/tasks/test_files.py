import pytest

from mateconv_jax.errors import UserError
from mateconv_jax.tasks.files import read_tasks
from tests.tasks import exams


def read(path):
    [task] = read_tasks([str(path)], "--tasks")
    return task


def test_a_ceval_folder(tmp_path):
    task = read(exams.ceval(tmp_path / "ceval"))
    assert (task.name, task.kind, task.style, task.chance) == ("ceval", "choice", "ceval", 0.25)
    assert task.subjects == ["law", "logic"] and len(task.questions) == 7  # of val/: test/ has no answers
    first, *_, last = task.questions
    assert first.text == "小明把书还给了图书馆，这是" and first.choices == ("履行义务", "行使权利", "违反合同", "无因管理")
    assert (first.id, first.answer, last.answer) == ("0", 0, 1)
    assert [question.answer for question in task.shots["logic"]] == [0, 1, 2, 3, 0]
    assert [len(task.limited(n).questions) for n in (1, 3, None)] == [2, 6, 7]
    assert task.fingerprint() == read(tmp_path / "ceval" / "val").fingerprint() != task.limited(1).fingerprint()


def test_a_cmmlu_folder_and_its_files_alone(tmp_path):
    folder = exams.cmmlu(tmp_path / "cmmlu")
    task = read(folder)
    assert (task.style, task.subjects, len(task.questions), len(task.shots["agronomy"])) == ("cmmlu", ["agronomy"], 3, 5)
    alone = read(folder / "test" / "agronomy.csv")
    assert alone.name == "agronomy" and alone.fingerprint() == task.fingerprint()
    (folder / "test" / "agronomy.csv").write_bytes(b"\xef\xbb\xbf" + (folder / "test" / "agronomy.csv").read_bytes())
    assert read(folder).questions == task.questions  # with a byte order mark


@pytest.mark.parametrize(
    "record, answer",
    [
        ({"question": "1 + 1 =", "choices": ["2", "3"], "answer": 1}, 1),
        ({"question": "1 + 1 =", "choices": ["2", "3"], "answer": "B"}, 1),
        ({"question": "1 + 1 =", "choices": ["2", "3"], "answer": "3"}, 1),  # a choice before an index
        ({"question": "x", "choices": ["p", "q"], "answer": "1"}, 1),
        ({"id": "Q1", "question": "x", "choices": {"text": ["p", "q"], "label": ["1", "2"]}, "answerKey": "2"}, 1),
        (
            {
                "question": {"stem": "x", "choices": [{"text": "p", "label": "A"}, {"text": "q", "label": "B"}]},
                "answerKey": "B",
            },
            1,
        ),
        ({"question": "x", "A": "p", "B": "q", "answer": "A"}, 0),
        ({"question": "x", "options": {"A": "p", "B": "q", "C": "r"}, "answer": "C"}, 2),
    ],
)
def test_exams_as_jsonl(record, answer, tmp_path):
    task = read(exams.jsonl(tmp_path / "exam.jsonl", [record]))
    assert (task.kind, task.style, task.questions[0].answer, task.subjects) == ("choice", "en", answer, [""])


def test_other_kinds(tmp_path):
    def only(record):
        task = read(exams.jsonl(tmp_path / "a.jsonl", [record]))
        return task.kind, task.style, task.questions[0]

    kind, style, cloze = only({"text": "他把____吃了。", "choices": ["苹果", "天空"], "answer": 0})
    assert (kind, style, cloze.text, cloze.after) == ("cloze", "zh", "他把", "吃了。")
    kind, _, given = only({"context": "中国的首都是", "continuation": "北京"})
    assert (kind, given.text, given.choices) == ("continuation", "中国的首都是", ("北京",))
    assert only({"text": "中国的首都是____", "answer": "北京"})[2].choices == ("北京",)
    assert only({"text": "the last word"})[2] == only({"context": "the last", "continuation": " word"})[2]
    for record in ({"question": "1+1=?", "answer": 2}, {"prompt": "x", "pattern": "y"}, {"messages": [], "answer": "z"}):
        kind, _, written = only(record)
        assert kind == "generation" and written.record == record


def test_examples_of_jsonl_by_subject(tmp_path):
    lines = [{"question": "x", "choices": ["p", "q"], "answer": 0, "subject": subject} for subject in ("art", "law")]
    exams.jsonl(tmp_path / "test.jsonl", lines)
    exams.jsonl(tmp_path / "dev.jsonl", lines + lines)
    task = read(tmp_path / "test.jsonl")
    assert task.subjects == ["art", "law"] and {s: len(shots) for s, shots in task.shots.items()} == {"art": 2, "law": 2}
    exams.jsonl(tmp_path / "exam.jsonl", lines)
    assert read(tmp_path / "exam.jsonl").shots == {}
    exams.jsonl(tmp_path / "exam_dev.jsonl", lines)
    assert len(read(tmp_path / "exam.jsonl").shots["art"]) == 1


def test_names(tmp_path):
    folder = exams.ceval(tmp_path / "my exam")
    assert [task.name for task in read_tasks([f"a={folder}", str(folder)], "--tasks")] == ["a", "my_exam"]
    with pytest.raises(UserError, match="two tasks have the name 'a'"):
        read_tasks([f"a={folder}", f"a={folder}"], "--tasks")


HEADER = "id,question,A,B,C,D,answer\n"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", HEADER + '0,"x\ny",1,2,3,4,A\n1,x,1,2,3,4,E\n', "a.csv:4: column answer: 'E' is invalid (expected one of A, B, C, D)"),
        ("a.csv", HEADER + "0,x,1,2,3,A\n", "a.csv:2: 6 cells, but the header has 7 columns"),
        ("a.csv", HEADER, "no questions in"),
        ("a.csv", "id,question,A,B,C,D\n0,x,1,2,3,4\n", "a.csv:1: column answer: missing (C-Eval publishes no answers"),
        ("a.csv", "text\nx\n", "a.csv:1: column question: missing"),
        ("a.csv", HEADER + '0,"x"y,1,2,3,4,A\n', "a.csv:2: not valid CSV"),
        ("a.csv", b"\xff\xfe", "a.csv:1: not UTF-8 (byte 0 of the file)"),
        ("a.jsonl", '{"question": "x", "choices": ["p", "q"], "answer": 0}\n{"quest', "a.jsonl:2: not JSON"),
        ("a.jsonl", "[1]\n", "a.jsonl:1: not a JSON object but list"),
        ("a.jsonl", '{"question": "x", "choices": ["p", "q"], "answer": 2}', "a.jsonl:1: \"answer\": 2 is invalid (expected an index from 0 to 1"),
        ("a.jsonl", '{"question": "x", "choices": ["p"], "answer": 0}', '"choices": there are 1'),
        ("a.jsonl", '{"question": "x", "choices": ["p", 3], "answer": 0}', "expected a list of texts"),
        ("a.jsonl", '{"question": " ", "choices": ["p", "q"], "answer": 0}', '"question": \' \' is invalid'),
        ("a.jsonl", '{"question": "x"}', '"answer": missing'),
        ("a.jsonl", '{"text": "没有空格"}', 'no gap (____) with an "answer"'),
        ("a.jsonl", '{"text": "__ __", "answer": "x"}', '"text": 2 gaps'),
        ("a.jsonl", '{"label": 3}', "no question (expected"),
        ("a.jsonl", '{"question": "x", "answer": "y"}\n{"context": "x", "continuation": "y"}', "a.jsonl:2: a question of the kind continuation"),
        ("a.txt", "x", "is neither .csv nor .jsonl"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_file_and_line(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        read(tmp_path / name)
    assert str(error.value).startswith("--tasks: ") and message in str(error.value)


def test_no_such_place(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, message in (("none", "there is no"), ("empty", "no questions in")):
        with pytest.raises(UserError, match=message):
            read(tmp_path / name)
    exams.ceval(tmp_path / "mixed")
    exams.jsonl(tmp_path / "mixed" / "val" / "z.jsonl", [{"question": "x", "answer": "y"}])
    with pytest.raises(UserError, match="z.jsonl holds questions of the kind generation, .*law_val.csv choice"):
        read(tmp_path / "mixed")
