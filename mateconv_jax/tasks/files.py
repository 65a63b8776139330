"""Tasks from local files, as their authors publish them.

A path is one of

    a folder with the parts dev/ (solved examples), val/ or test/    C-Eval, CMMLU, or the same with JSONL files
    a folder of files, one a subject; files *_dev are the examples
    one .csv or .jsonl file                                          its examples: see `_dev_files`
"""

import re
from pathlib import Path

from mateconv_jax.errors import UserError
from mateconv_jax.tasks import csv_questions, jsonl_questions
from mateconv_jax.tasks.questions import Question, Style, Task

READERS = {".csv": csv_questions.read, ".jsonl": jsonl_questions.read}
PARTS = ("val", "validation", "test")  # the first that is there: C-Eval publishes no answers to its test part
EXPECTED = "a C-Eval or CMMLU folder, or .csv or .jsonl files of questions"
PART_OF_NAME = re.compile(r"(^|[_.-])(val|validation|test|dev)$")
CHINESE = re.compile("[\u3400-\u9fff]")


def read_tasks(paths: list[str], key: str) -> list[Task]:
    """The tasks at these paths.

    Args:
      paths: each PATH or NAME=PATH; the name is that of the file or folder otherwise.
      key: the flag or configuration key that the paths came from, for error messages.

    Raises:
      UserError: a file cannot be read, or holds anything but questions; two tasks have the same name.
    """
    tasks = []
    for given in paths:
        match = re.fullmatch(r"([\w-]+)=(.+)", given)
        name, path = ("", Path(given)) if match is None or Path(given).exists() else (match[1], Path(match[2]))
        tasks.append(_read_task(name or _name(path), path.expanduser(), key))
    names = [task.name for task in tasks]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{key}: two tasks have the name {twice!r} (expected different ones; NAME=PATH gives a name)")
    return tasks


def _name(path: Path) -> str:
    """data/ceval and data/ceval/val are ceval, law_val.csv is law. A slash or a comma would be read as another separator."""
    name = PART_OF_NAME.sub("", path.absolute().stem if path.is_file() else path.absolute().name)
    return re.sub(r"[^\w-]+", "_", name or path.absolute().parent.name)


def _read_task(name: str, path: Path, key: str) -> Task:
    files = _files(path, key)
    questions, shots, shot_files = [], {}, {}
    kind = style = None
    for file in files:
        default_subject = "" if file == path and file.suffix == ".jsonl" else PART_OF_NAME.sub("", file.stem)
        found_kind, found_style, found = READERS[file.suffix](file, default_subject, key)
        if kind not in (None, found_kind):
            raise UserError(f"{key}: {file} holds questions of the kind {found_kind}, {files[0]} {kind} (expected one kind)")
        kind, style = found_kind, found_style or style
        questions += found
        for dev in _dev_files(file):
            if dev.is_file():
                for example in READERS[dev.suffix](dev, default_subject, key)[2]:
                    shots.setdefault(example.subject, []).append(example)
                break
        shot_files |= dict.fromkeys({q.subject for q in found}, " or ".join(map(str, _dev_files(file))))
    assert kind is not None  # a reader raises for a file without questions
    style = style or _language(questions)
    return Task(name, path, kind, style, tuple(questions), {s: tuple(found) for s, found in shots.items()}, shot_files)


def _files(path: Path, key: str) -> list[Path]:
    """The files with the questions that are asked, sorted by name."""
    if path.is_file():
        if path.suffix not in READERS:
            raise UserError(f"{key}: {str(path)!r} is neither .csv nor .jsonl (expected {EXPECTED})")
        return [path]
    if not path.is_dir():
        raise UserError(f"{key}: there is no {str(path)!r} (expected {EXPECTED})")
    for folder in [*(path / part for part in PARTS), path]:
        files = sorted(file for file in folder.glob("*") if file.suffix in READERS and not file.stem.endswith("_dev"))
        if files:
            return files
    raise UserError(f"{key}: no questions in {str(path)!r} (expected {EXPECTED})")


def _dev_files(file: Path) -> list[Path]:
    """Where the solved examples for a file may be: law_val.csv: ../dev/law_dev.csv, ../dev/law_val.csv or law_dev.csv;
    test.jsonl: dev.jsonl.
    """
    if file.stem in PARTS:
        return [file.with_name(f"dev{file.suffix}")]
    of_subject = f"{PART_OF_NAME.sub('', file.stem)}_dev{file.suffix}"
    beside = [file.parent.parent / "dev" / name for name in (of_subject, file.name)] if file.parent.name in PARTS else []
    return [*beside, file.with_name(of_subject)]


def _language(questions: list[Question]) -> Style:
    return "zh" if any(CHINESE.search(question.text) for question in questions) else "en"
