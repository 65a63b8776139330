import csv
import io
import json

import pytest
from hypothesis import given, strategies as st

from mateconv_jax.data.text import csv_rows, lines as lines_lib, sources
from mateconv_jax.data.text.sources import ChunkSizes

# As MateConv wrote its sft_data.csv: pandas' to_csv with these, which are csv.writer's; the header's line ends in LF.
MATECONV = {"escapechar": "\\", "quoting": csv.QUOTE_MINIMAL, "lineterminator": "\r\n"}


def written(rows, **dialect):
    file = io.StringIO(newline="")
    csv.writer(file, **dialect).writerows(rows)
    return file.getvalue()


def read(content, delimiter=",", longest=1 << 20, line_bytes=1 << 20):
    """[(line, row or (rule, reason))]; the rows are dicts."""
    content = content if isinstance(content, bytes) else content.encode()
    lines = lines_lib.lines((content[i : i + 7] for i in range(0, len(content), 7)), min(longest, line_bytes))
    found = csv_rows.rows(lines, delimiter, longest)
    return [(line, json.loads(row) if isinstance(row, bytes) else row) for line, row in found]


def cells(content, **options):
    return [list(row.values()) if isinstance(row, dict) else row[0] for _, row in read(content, **options)]


# Without carriage returns: csv.reader takes them, outside quotes, for ends of lines, as csv.writer does.
cell = st.text(st.sampled_from("你a ,;\"\\'\n\t[]n"), max_size=12)
table = st.integers(2, 4).flatmap(lambda n: st.lists(st.lists(cell, min_size=n, max_size=n), max_size=6))


@given(table, st.sampled_from([",", "\t"]), st.sampled_from(["\n", "\r\n"]))
def test_what_a_csv_writer_wrote_comes_back(rows, delimiter, end):
    header = [f"column {i}" for i in range(len(rows[0]) if rows else 2)]
    content = written([header, *rows], delimiter=delimiter, lineterminator=end)
    not_blank = [row for row in rows if written([row], delimiter=delimiter).strip()]  # of TSV a row may be tabs alone
    assert cells(content, delimiter=delimiter) == not_blank


@given(st.lists(st.tuples(st.lists(st.tuples(cell, cell).map(list)), cell, cell)))
def test_what_mateconv_wrote_comes_back(rows):
    content = "history,q,a\n" + written(rows, **MATECONV)
    found = [(eval(history), q, a) for history, q, a in cells(content)]
    assert found == [tuple(row) for row in rows]


def test_mateconvs_rows_in_bytes():
    content = 'history,q,a\n[],你好,好\r\n"[[\'他说：\\\\n""走""\', \'好，\\\\\\\\alpha\']]","一\r\n二",C:\\\\新\r\n[],末,尾'
    assert cells(content) == [
        ["[]", "你好", "好"],
        ["[['他说：\\n\"走\"', '好，\\\\alpha']]", "一\r\n二", "C:\\新"],
        ["[]", "末", "尾"],
    ]
    assert [line for line, _ in read(content)] == [2, 3, 5]


@pytest.mark.parametrize("content, row", [
    ('text,n\n"\\frac{1}{2} \\\\ C:\\new",1\n', ["\\frac{1}{2} \\\\ C:\\new", "1"]),  # LaTeX and paths stay
    ('text,n\n"C:\\",1\n', ["C:\\", "1"]),
    ('text,n\n"他说：\\"走\\"，好",1\n', ['他说："走"，好', "1"]),  # \" where nothing else can be meant
    ('text,n\n"他说：\\"走\\" \\n",1\n', ['他说："走" \\n', "1"]),
    ("text,n\n一\\,二,1\n", ["一,二", "1"]),
    ("history,q,a\n\"[['一\\n二', '三']]\",q,a\n", ["[['一\\n二', '三']]", "q", "a"]),  # MiniMind's, which doubles none
    ("history,q,a\n\"[['一\\n二', '\\\\三']]\",q,a\n", ["[['一\\n二', '\\\\三']]", "q", "a"]),
    ('a,q,history\n"C:\\",q,[]\n', ["C:\\", "q", "[]"]),
])  # fmt: skip
def test_a_backslash_is_text_unless_it_must_be_an_escape(content, row):
    assert cells(content) == [row]


@pytest.mark.parametrize("content, found", [
    ("q,a\n1,2\n1\n1,2,3\n3,4\n", [(2, ["1", "2"]), (3, "bad_row"), (4, "bad_row"), (5, ["3", "4"])]),
    ('q,a\n"1"x,2\n3,4\n', [(2, "bad_row"), (3, ["3", "4"])]),
    ('q,a\n"1\\"x\n3,4\n"5",6\n', [(2, "bad_row"), (3, ["3", "4"]), (4, ["5", "6"])]),
    ('q,a\n"1\n"x,2\n3,4\n', [(2, "bad_row"), (4, ["3", "4"])]),
    ("q,a\n1\r2,2\n3,4\n", [(2, "bad_row"), (3, ["3", "4"])]),
    ("\n\nq,a\n\n1,2\n \n3,4\n\n", [(5, ["1", "2"]), (7, ["3", "4"])]),
    ('q,a\n1,2\n"3,4\n5,6\n', [(2, ["1", "2"]), (3, "broken_file")]),
    ("q,a,q\n1,2,3\n", [(1, "broken_file")]),
    ('"q"x,a\n1,2\n', [(1, "broken_file")]),
    (b'\xef\xbb\xbf"q",a\n\xff,1\n1,2\n', [(2, "invalid_utf8"), (3, ["1", "2"])]),
    ("q,a\n" + "x" * 900 + ",2\n3,4\n", [(2, "line_too_long"), (3, ["3", "4"])]),
    ('q,a\n"' + "x\n" * 450 + '",2\n3,4\n', [(2, "line_too_long")]),
    ("", []),
    ("q,a\n", []),
])  # fmt: skip
def test_bad_rows_are_rejected_and_the_next_ones_read(content, found):
    read_rows = [(line, list(row.values()) if isinstance(row, dict) else row[0]) for line, row in read(content, longest=500)]
    assert all(set(row) == {"q", "a"} for _, row in read(content, longest=500) if isinstance(row, dict))
    assert read_rows[: len(found)] == found and (len(read_rows) == len(found) or found[-1][1] == "line_too_long")


def test_rejects_say_what_is_wrong():
    content = 'history,q,a\n[],1\n[],"1"x,2\n[],1\r2,3\n'
    assert [reason for _, (_, reason) in read(content)] == [
        "2 columns (expected 3: history, q, a)",
        "not CSV (',' expected after '\"')",
        "not CSV (a carriage return outside quotes)",
    ]
    assert read('q,a\n"1,2\n', longest=500)[0][1][1] == "a quoted field has no end"
    assert read("q,q\n")[0][1][1] == "two columns are named 'q'"
    (_, reason) = read('q,a\n"' + "x\n" * 450, longest=500)[0][1]
    assert reason == "a row of more than 500 bytes (is the quote in line 2 ever closed?)"


@given(
    st.lists(st.text(st.sampled_from('a,"\\\n\r'), max_size=20).map(str), max_size=5), st.sampled_from(["history,q,a", "q,a"])
)
def test_any_file_gives_rows_and_rejects(parts, header):
    for line, row in read(f"{header}\n{''.join(parts)}", longest=50):
        assert line > 1 and (
            list(row) == header.split(",") if isinstance(row, dict) else row[0] in ("bad_row", "broken_file", "line_too_long")
        )


def test_rows_do_not_depend_on_how_the_file_is_read_and_are_cut_into_chunks(tmp_path, monkeypatch):
    rows = [[f'{i}\n,"', "\\" * (i % 3) + "x" * i] for i in range(50)]
    path = tmp_path / "A.CSV"
    path.write_text(written([["q", "a"], *rows]), encoding="utf-8", newline="")
    whole = list(sources.chunks(sources.find([str(path)]), 0, ChunkSizes(300)))
    monkeypatch.setattr(sources, "READ_BYTES", 3)
    assert [chunk.parts[0].records for chunk in sources.chunks(sources.find([str(path)]), 0, ChunkSizes(300))] == [
        chunk.parts[0].records for chunk in whole
    ]
    records = [record for chunk in whole for record in chunk.parts[0].records]
    assert len(whole) > 3 and [line for line, _ in records] == [2 * i + 2 for i in range(50)]
    assert [list(json.loads(record).values()) for _, record in records] == rows
    assert whole[-1].parts[-1].position == path.stat().st_size


def test_many_bad_rows_take_linear_time():
    """Both ways of reading end at the next quote, whatever was tried before."""
    for line in ('"a"x\\', '"a\\"x', "\\,\\", '"\\', '\\"\\'):
        content = "q,a\n" + f"{line}\n" * 20_000
        assert len(read(content, longest=1 << 24)) <= 20_000
