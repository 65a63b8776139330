"""Made-up questions, in files as the authors of real ones publish theirs."""

import csv
import json

LAW = [
    ("小明把书还给了图书馆，这是", "履行义务", "行使权利", "违反合同", "无因管理", "A"),
    ("下列哪一项是合同的当事人？", "天气", "甲方", "纸张", "墨水", "B"),
    ("红灯亮时，行人应当\n停下，还是", "快跑", "慢走", "停下", "唱歌", "C"),
]
LOGIC = [
    ("甲比乙高，乙比丙高，那么最高的是 ", "甲", "乙", "丙", "无法判断", "A"),
    ("所有的猫都是动物，所以", "动物都是猫", "猫都不是动物", "有的动物是猫", "没有猫", "C"),
    ("1, 2, 4, 8 之后是", "9", "10", "12", "16个", "D"),
    ("如果下雨，地就湿。地没有湿，所以", "下雨了", "没有下雨", "刮风了", "下雪了", "B"),
]
DEV = [(f"第{i}个例子，选{letter}：", "甲", "乙", "丙", "丁", letter) for i, letter in enumerate("ABCDA")]


def write_csv(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def ceval(folder):
    """dev/SUBJECT_dev.csv with explanations, val/SUBJECT_val.csv, test/SUBJECT_test.csv without answers."""
    header = ["id", "question", "A", "B", "C", "D"]
    for subject, questions in (("law", LAW), ("logic", LOGIC)):
        numbered = [(i, *question) for i, question in enumerate(questions)]
        write_csv(folder / "val" / f"{subject}_val.csv", [*header, "answer"], numbered)
        write_csv(folder / "test" / f"{subject}_test.csv", header, [row[:-1] for row in numbered])
        dev = [(i, *question, "因为如此。") for i, question in enumerate(DEV)]
        write_csv(folder / "dev" / f"{subject}_dev.csv", [*header, "answer", "explanation"], dev)
    return folder


def cmmlu(folder):
    """dev/SUBJECT.csv and test/SUBJECT.csv, as pandas wrote them."""
    for part, subject, questions in (("dev", "agronomy", DEV), ("test", "agronomy", LAW)):
        numbered = [(i, *question) for i, question in enumerate(questions)]
        write_csv(folder / part / f"{subject}.csv", ["", "Question", "A", "B", "C", "D", "Answer"], numbered)
    return folder


def jsonl(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path
