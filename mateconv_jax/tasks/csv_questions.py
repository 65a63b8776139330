"""Exam questions from CSV, as C-Eval and CMMLU publish them.

C-Eval:  id,question,A,B,C,D,answer[,explanation]
CMMLU:   ,Question,A,B,C,D,Answer
"""

import csv
import io
from pathlib import Path
from string import ascii_uppercase

from mateconv_jax.errors import UserError
from mateconv_jax.tasks.questions import Kind, Question, Style

NO_ANSWERS = "C-Eval publishes no answers to its test part: give the whole folder, or its val/"


def read(path: Path, subject: str, key: str) -> tuple[Kind, Style | None, list[Question]]:
    """The questions of one subject. Texts stay exactly as the file has them.

    Raises:
      UserError: the file cannot be read, a column is missing, or a cell has no valid value; with line and column.
    """
    rows = csv.reader(io.StringIO(read_utf8(path, key), newline=""), strict=True)
    questions, columns, letters, style = [], {}, "", None
    start = 1
    try:
        for row in rows:
            line, start = start, rows.line_num + 1  # a cell may hold line breaks
            if not row:
                continue
            where = f"{path}:{line}"
            if not columns:
                columns, letters = _columns(row, f"{key}: {where}")
                style = "cmmlu" if "Question" in row else "ceval"
                continue
            if len(row) != len(columns):
                raise UserError(f"{key}: {where}: {len(row)} cells, but the header has {len(columns)} columns")
            cells = {name: row[i] for name, i in columns.items()}
            answer = cells["answer"].strip()
            if answer not in list(letters):
                known = ", ".join(letters)
                raise UserError(f"{key}: {where}: column answer: {answer!r} is invalid (expected one of {known})")
            number = cells.get("id", cells.get("", "")) or str(len(questions))
            choices = tuple(cells[letter.lower()] for letter in letters)
            questions.append(Question(where, number, subject, cells["question"], choices, letters.index(answer)))
    except csv.Error as error:
        raise UserError(f"{key}: {path}:{rows.line_num}: not valid CSV ({error})") from error
    if not questions:
        raise UserError(f"{key}: no questions in {str(path)!r} (expected the columns question, A, B, C, D, answer)")
    return "choice", style, questions


def _columns(header: list[str], where: str) -> tuple[dict[str, int], str]:
    """{name in lower case: index}, and the letters of the choices."""
    columns = {name.strip().lower(): i for i, name in enumerate(header)}
    letters = ""
    for letter in ascii_uppercase:
        if letter.lower() not in columns:
            break
        letters += letter
    missing = [name for name in ("question", "A", "B", "answer") if name.lower() not in columns]
    if missing:
        hint = f" ({NO_ANSWERS})" if missing == ["answer"] else ""
        raise UserError(f"{where}: column {missing[0]}: missing{hint} (there are: {', '.join(header)})")
    if len(columns) < len(header):
        raise UserError(f"{where}: two columns have the same name ({', '.join(header)})")
    return columns, letters


def read_utf8(path: Path, key: str) -> str:
    """A UTF-8 file, with or without a byte order mark.

    Raises:
      UserError: it cannot be read or is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{key}: cannot read {str(path)!r} ({error.strerror})") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{key}: {path}:{line}: not UTF-8 (byte {error.start} of the file)") from error
