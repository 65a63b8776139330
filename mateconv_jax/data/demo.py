"""The demo corpus: a small Chinese world that a small model can learn in minutes, and a checker for what the model then says.

    python -m mateconv_jax.data.demo --output data/demo.jsonl
    python -m mateconv_jax.data.demo --output data/demo_dialogues.jsonl --kind dialogues
    python -m mateconv_jax.data.demo --output data/demo_preferences.jsonl --kind preferences
    python -m mateconv_jax.data.demo --output data/demo_cloze.jsonl --kind cloze

Texts are stories and plain statements of facts, one {"text": …} a line, for pretraining. Dialogues ask for the facts, one
{"messages": […]} a line, for fine-tuning: for most facts, and for each of these in two of the three wordings. So what a model
answers to the third wording, and about the other facts, tells what it has learned from other dialogues, and from texts alone.
Preferences ask for the facts of the dialogues in the same wordings, and prefer the bare answer (巴黎。) to the statement
(法国的首都是巴黎。), one {"chosen": […], "rejected": […]} a line.

exam and cloze ask for every fact once, with up to four answers of its kind to choose from, for `evaluate --tasks`: the exam asks,
one {"subject": …, "question": …, "choices": […], "answer": 2} a line; the cloze has the statement with a gap as its "text".
"""

import argparse
import json
import os
import random
import re
import sys
from pathlib import Path

from tqdm import tqdm

from mateconv_jax import files
from mateconv_jax.errors import exit_code, program

# ---- words --------------------------------------------------------------------------------------------------------
# A sentence is made of parts: a fixed text, a list to choose from, or one of the story's two people. Words that depend on
# each other (a place and what one does there, a number's measure word and its noun) are one choice.

HERO, FRIEND = "{hero}", "{friend}"

PEOPLE = [
    "小明", "小红", "小刚", "小丽", "小华", "小芳", "小军", "小英", "小强", "小梅", "小龙", "小玉",
    "老王", "老李", "老张", "老陈", "王奶奶", "李爷爷", "张阿姨", "陈叔叔", "刘老师", "赵医生", "周师傅", "吴大妈",
]  # fmt: skip
TIMES = [
    "今天早上", "昨天下午", "星期天", "上个周末", "春天的一个早晨", "夏天的傍晚", "秋天的午后", "放学以后",
    "吃过早饭", "下班以后", "假期里", "天刚亮的时候",
]  # fmt: skip
OUTINGS = [
    place + purpose
    for place, purposes in {
        "公园": ["散步", "放风筝", "跑步"], "图书馆": ["看书", "借书"], "市场": ["买菜", "买水果", "卖鸡蛋"],
        "河边": ["钓鱼", "画画", "洗衣服"], "学校": ["上课", "打球"], "山上": ["采蘑菇", "看日出"],
        "海边": ["游泳", "捡贝壳"], "花园": ["浇花", "看花"], "车站": ["接朋友", "等车"], "商店": ["买铅笔", "买毛巾"],
        "田里": ["种菜", "摘西瓜"], "湖边": ["划船", "看天鹅"], "城里": ["看电影", "看望亲戚"],
    }.items()
    for purpose in purposes
]  # fmt: skip
NUMBERS = ["一", "两", "三", "四", "五", "六", "七", "八", "九", "十"]
COLORS = ["白色", "黑色", "黄色", "灰色", "棕色", "花色"]
ANIMALS = [  # (measure word, animal and what it does)
    (measure, animal + "在" + action)
    for measure, animal, actions in [
        ("只", "小猫", ["睡觉", "晒太阳", "追尾巴"]), ("条", "小狗", ["奔跑", "看门", "晒太阳"]),
        ("匹", "马", ["吃草", "奔跑"]), ("头", "牛", ["吃草", "耕田"]), ("只", "山羊", ["吃草", "爬山坡"]),
        ("只", "小鸟", ["唱歌", "筑巢", "喝水"]), ("条", "鱼", ["游来游去", "吐泡泡"]), ("只", "鸭子", ["游水", "排队走路"]),
        ("只", "兔子", ["吃青草", "蹦蹦跳跳"]), ("只", "松鼠", ["吃松果", "爬树"]), ("只", "蝴蝶", ["飞舞", "采花粉"]),
        ("头", "小猪", ["睡觉", "拱土"]),
    ]
    for action in actions
]  # fmt: skip
GIFTS = [
    measure + thing
    for measure, things in {
        "本": ["故事书", "图画书", "词典"], "朵": ["玫瑰花", "菊花"], "个": ["苹果", "梨", "石榴", "面包"],
        "支": ["铅笔", "毛笔"], "块": ["蛋糕", "手帕"], "幅": ["山水画", "年画"], "顶": ["草帽", "毛线帽"], "把": ["雨伞", "扇子"],
    }.items()
    for thing in things
]  # fmt: skip
MEALS = ["吃面条", "吃饺子", "吃包子", "吃西瓜", "吃月饼", "吃烤鱼", "喝绿茶", "喝豆浆", "喝牛奶", "喝果汁", "喝鸡汤"]
MOODS = ["说说笑笑", "非常开心", "心满意足", "讲了许多故事", "都舍不得离开", "聊起了从前的事"]
WEATHER = {  # what happens in the sky, and what one does then
    "忽然下起了雨": ["撑开了雨伞", "跑进了屋里", "躲到了树下"], "外面刮起了风": ["关上了窗户", "扣好了大衣"],
    "天上飘起了雪": ["堆了一个雪人", "戴上了手套"], "天慢慢黑了": ["点亮了灯", "加快了脚步"],
    "太阳出来了": ["晒起了被子", "脱下了外套"],
}  # fmt: skip
THOUGHTS = ["今天过得真快", "这里的风景真美", "有朋友真好", "明天还要再来", "应该多帮助别人", "自己学到了很多"]
RETURNS = ["骑着自行车", "坐着公共汽车", "哼着歌", "提着篮子", "慢慢地走着", "高高兴兴地"]

# ---- facts --------------------------------------------------------------------------------------------------------

KINDS = {  # statement, questions, {subject: answer}
    "capital": (
        "{}的首都是{}。",
        ["{}的首都是哪里？", "请问{}的首都在哪里？", "你知道{}的首都是哪座城市吗？"],
        {
            "中国": "北京", "法国": "巴黎", "日本": "东京", "英国": "伦敦", "德国": "柏林", "俄罗斯": "莫斯科", "意大利": "罗马",
            "埃及": "开罗", "泰国": "曼谷", "韩国": "首尔", "西班牙": "马德里", "希腊": "雅典", "古巴": "哈瓦那", "秘鲁": "利马",
        },
    ),
    "continent": (
        "{}位于{}。",
        ["{}位于哪个洲？", "请问{}在哪个洲？", "你知道{}属于哪个洲吗？"],
        {
            "中国": "亚洲", "法国": "欧洲", "日本": "亚洲", "英国": "欧洲", "德国": "欧洲", "俄罗斯": "欧洲", "意大利": "欧洲",
            "埃及": "非洲", "泰国": "亚洲", "韩国": "亚洲", "西班牙": "欧洲", "希腊": "欧洲", "古巴": "北美洲", "秘鲁": "南美洲",
        },
    ),
    "currency": (
        "{}的货币是{}。",
        ["{}的货币是什么？", "请问{}用什么货币？", "你知道{}的货币叫什么吗？"],
        {
            "中国": "人民币", "法国": "欧元", "日本": "日元", "英国": "英镑", "德国": "欧元", "俄罗斯": "卢布", "意大利": "欧元",
            "埃及": "埃及镑", "泰国": "泰铢", "韩国": "韩元", "西班牙": "欧元", "希腊": "欧元", "古巴": "比索", "秘鲁": "索尔",
        },
    ),
    "color": (
        "{}的颜色是{}。",
        ["{}是什么颜色？", "请问{}的颜色是什么？", "你知道{}是什么颜色的吗？"],
        {
            "草莓": "红色", "香蕉": "黄色", "葡萄": "紫色", "雪花": "白色", "煤炭": "黑色", "树叶": "绿色", "大海": "蓝色",
            "橘子": "橙色", "熊猫": "黑白两色", "兔子": "白色", "小猫": "灰色", "松鼠": "棕色", "猴子": "金黄色", "蚕宝宝": "白色",
            "老牛": "黑色", "小狗": "黄色",
        },
    ),
    "food": (
        "{}最爱吃{}。",
        ["{}最爱吃什么？", "请问{}喜欢吃什么？", "你知道{}爱吃什么吗？"],
        {
            "熊猫": "竹子", "兔子": "胡萝卜", "小猫": "鱼", "松鼠": "松果", "猴子": "桃子", "蚕宝宝": "桑叶", "老牛": "青草",
            "小狗": "骨头",
        },
    ),
    "home": (
        "{}住在{}。",
        ["{}住在哪里？", "请问{}的家在哪里？", "你知道{}住在什么地方吗？"],
        {
            "熊猫": "竹林里", "兔子": "草地上", "小猫": "屋里", "松鼠": "树洞里", "猴子": "大山里", "蚕宝宝": "桑树上", "老牛": "牛棚里",
            "小狗": "院子里",
        },
    ),
    "author": (
        "{}的作者是{}。",
        ["{}的作者是谁？", "请问{}是谁写的？", "你知道{}的作者是哪一位吗？"],
        {
            "《红楼梦》": "曹雪芹", "《西游记》": "吴承恩", "《三国演义》": "罗贯中", "《水浒传》": "施耐庵",
            "《静夜思》": "李白", "《春晓》": "孟浩然",
        },
    ),
    "form": (
        "{}是一{}。",
        ["{}是什么样的作品？", "请问{}是诗还是小说？", "你知道{}是哪一类作品吗？"],
        {
            "《红楼梦》": "部小说", "《西游记》": "部小说", "《三国演义》": "部小说", "《水浒传》": "部小说", "《静夜思》": "首诗",
            "《春晓》": "首诗",
        },
    ),
    "dynasty": (
        "{}写于{}。",
        ["{}写于哪个朝代？", "请问{}是什么时候写的？", "你知道{}是哪个朝代的作品吗？"],
        {
            "《红楼梦》": "清代", "《西游记》": "明代", "《三国演义》": "元末明初", "《水浒传》": "元末明初", "《静夜思》": "唐代",
            "《春晓》": "唐代",
        },
    ),
}  # fmt: skip

# (kind, subject, answer), 92 of them
FACTS = [(kind, subject, answer) for kind, (_, _, answers) in KINDS.items() for subject, answer in answers.items()]


def statement(fact: tuple[str, str, str]) -> str:
    kind, subject, answer = fact
    return KINDS[kind][0].format(subject, answer)


def short_answer(fact: tuple[str, str, str]) -> str:
    kind, _, answer = fact
    return f"一{answer}。" if kind == "form" else f"{answer}。"


def questions(fact: tuple[str, str, str]) -> list[str]:
    """Three ways to ask for it."""
    kind, subject, _ = fact
    return [question.format(subject) for question in KINDS[kind][1]]


SUBJECTS = list(dict.fromkeys(subject for _, subject, _ in FACTS))


def is_in_dialogues(fact: tuple[str, str, str]) -> bool:
    """Whether dialogues ask for it: of every third subject of which three facts are known, they ask for two."""
    kind, subject, _ = fact
    kinds, i = [kind for kind, (_, _, answers) in KINDS.items() if subject in answers], SUBJECTS.index(subject)
    return len(kinds) < 3 or i % 3 != 0 or kinds.index(kind) != i // 3 % 3


def withheld_question(fact: tuple[str, str, str]) -> str:
    """The wording in which no dialogue asks for this fact, though for others."""
    return questions(fact)[FACTS.index(fact) % 3]


# ---- grammar ------------------------------------------------------------------------------------------------------

OPENING = (TIMES, "，", HERO, "去", OUTINGS, "。")
MIDDLES = [
    (HERO, "看见", NUMBERS, [f"{measure}{color}的{rest}" for measure, rest in ANIMALS for color in COLORS], "。"),
    (HERO, "拿出", NUMBERS, GIFTS, "送给", FRIEND, "。"),
    (HERO, "和", FRIEND, "一起", MEALS, "，", MOODS, "。"),
    *((change, "，", HERO, reactions, "。") for change, reactions in WEATHER.items()),
    (HERO, "对", FRIEND, "说，", THOUGHTS, "。"),
]
ENDING = (HERO, RETURNS, "回家了。")


def _sentence(parts, hero: str, friend: str, rng: random.Random) -> str:
    text = "".join(part if isinstance(part, str) else rng.choice(part) for part in parts)
    return text.format(hero=hero, friend=friend)


def _pattern(parts) -> str:
    choices = [PEOPLE if part in (HERO, FRIEND) else [part] if isinstance(part, str) else part for part in parts]
    return "".join(f"(?:{'|'.join(map(re.escape, words))})" for words in choices)


_SENTENCE = re.compile(
    "|".join(
        [_pattern(parts) for parts in (OPENING, *MIDDLES, ENDING)]
        + [re.escape(text) for fact in FACTS for text in (statement(fact), *questions(fact))]
    )
)


def is_sentence(text: str) -> bool:
    """Whether `text` is one sentence of the demo world: a story's sentence, a fact that is true, or a question for one."""
    return _SENTENCE.fullmatch(text) is not None


def sentences(text: str) -> list[str]:
    """A document's sentences, each with its mark at the end; what follows the last mark counts as one more."""
    return re.findall(r"[^。？]+[。？]?", text)


REPEAT = "跟我说："

# ---- documents ----------------------------------------------------------------------------------------------------


def story(rng: random.Random) -> str:
    """Four to six sentences about two people."""
    hero, friend = rng.sample(PEOPLE, 2)
    middles = rng.sample(MIDDLES, rng.randint(2, 4))
    return "".join(_sentence(parts, hero, friend, rng) for parts in (OPENING, *middles, ENDING))


def statements(rng: random.Random) -> str:
    """Two to four facts."""
    return "".join(map(statement, rng.sample(FACTS, rng.randint(2, 4))))


def dialogue(rng: random.Random) -> list[dict[str, str]]:
    """One to three questions with their answers, or a sentence of a story to repeat."""
    if rng.random() < 0.35:
        sentence = rng.choice(sentences(story(rng)))
        return [{"role": "user", "content": REPEAT + sentence}, {"role": "assistant", "content": sentence}]
    messages = []
    for fact in rng.sample([fact for fact in FACTS if is_in_dialogues(fact)], rng.randint(1, 3)):
        wordings = [question for question in questions(fact) if question != withheld_question(fact)]
        messages.append({"role": "user", "content": rng.choice(wordings)})
        messages.append({"role": "assistant", "content": statement(fact)})
    return messages


def preference(rng: random.Random) -> dict[str, list[dict[str, str]]]:
    """A question with its short answer and with the statement, behind none or one other that is answered shortly."""
    messages = []
    facts = rng.sample([fact for fact in FACTS if is_in_dialogues(fact)], rng.randint(1, 2))
    for fact in facts:
        wordings = [question for question in questions(fact) if question != withheld_question(fact)]
        messages.append({"role": "user", "content": rng.choice(wordings)})
        messages.append({"role": "assistant", "content": short_answer(fact)})
    rejected = {"role": "assistant", "content": statement(facts[-1])}
    return {"chosen": messages, "rejected": [*messages[:-1], rejected]}


def choose(fact: tuple[str, str, str], rng: random.Random) -> dict[str, object]:
    """The answer among up to three others of its kind."""
    kind, _, answer = fact
    others = [other for other in dict.fromkeys(KINDS[kind][2].values()) if other != answer]
    choices = rng.sample(others, min(3, len(others)))
    choices.insert(rng.randint(0, len(choices)), answer)
    return {"choices": choices, "answer": choices.index(answer)}


def exam(rng: random.Random, kind: str) -> list[dict[str, object]]:
    """All facts, sorted by subject. kind: exam or cloze."""
    gap = "____"
    asked = {
        "exam": lambda fact: {"question": questions(fact)[0]},
        "cloze": lambda fact: {"text": statement((*fact[:2], gap))},
    }[kind]
    return [{"subject": fact[0]} | asked(fact) | choose(fact, rng) for fact in FACTS]


KINDS_OF_DOCUMENTS = ("texts", "dialogues", "mixed", "preferences", "exam", "cloze")


def corpus(n_documents: int, seed: int, kind: str = "texts"):
    """JSON objects, one a document, in random order: texts (60 % stories, 40 % statements), dialogues, half of each, or
    preferences; or at most all the questions of an exam or a cloze.
    """
    rng = random.Random(seed)
    if kind in ("exam", "cloze"):
        yield from exam(rng, kind)[:n_documents]
        return
    for _ in range(n_documents):
        if kind == "preferences":
            yield preference(rng)
        elif kind == "dialogues" or kind == "mixed" and rng.random() < 0.5:
            yield {"messages": dialogue(rng)}
        else:
            yield {"text": statements(rng) if rng.random() < 0.4 else story(rng)}


def main(args):
    lines = (json.dumps(document, ensure_ascii=False) for document in corpus(args.documents, args.seed, args.kind))
    documents = list(tqdm(lines, "demo corpus", args.documents, unit="doc", mininterval=1, disable=None))
    text = "".join(line + "\n" for line in documents)
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(output, text)
    print(f"{output}: {len(documents):,} documents, {output.stat().st_size / 1e6:.1f} MB")


def parse_args(argv):
    parser = argparse.ArgumentParser(prog=program("data.demo"), description="Write the demo corpus.")
    parser.add_argument("--output", type=os.path.expanduser, required=True, help="the JSONL file to write")
    parser.add_argument("--kind", choices=KINDS_OF_DOCUMENTS, default="texts", help="texts to pretrain on (default), dialogues to fine-tune on, both mixed, preferences, or questions for evaluate --tasks (exam, cloze)")  # fmt: skip
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def command() -> int:
    """What `mateconv-demo` runs."""
    return exit_code(lambda: main(parse_args(sys.argv[1:])))


if __name__ == "__main__":
    sys.exit(command())
