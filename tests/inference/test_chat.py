import json
import os
import signal
import threading
import time

import jax
import prompt_toolkit.input
import prompt_toolkit.output
import pytest
from prompt_toolkit.application import create_app_session

from mateconv_jax import GenerationConfig
from mateconv_jax.data.tokenizer.chat import encode_chat
from mateconv_jax.errors import UserError
from mateconv_jax.inference import chat

CONFIG = GenerationConfig(temperature=1.0, max_new_tokens=8, min_new_tokens=8, seed=3)
CONTEXT = 96  # of the generator


@pytest.fixture
def talk(generator, capsys, tmp_path):
    """Says lines, and returns what is printed after the banner and the dialogue as /save writes it."""

    def talk(*lines, config=CONFIG, name="out"):
        saved = tmp_path / "dialogue.json"
        saved.unlink(missing_ok=True)
        capsys.readouterr()
        chat.run(generator, config, name, [*lines, f"/save {saved}"])
        output = capsys.readouterr().out.split("\n\n", 1)[1]
        return output, json.loads(saved.read_text()) if saved.exists() else []

    return talk


def turns(*contents):
    """A user's and an assistant's, by turns."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


# ---- turns --------------------------------------------------------------------------------------------------------


def test_answers_are_the_generators_and_stay_in_the_dialogue(generator, talk):
    first = generator.chat(turns("熊猫"), CONFIG)
    second = generator.chat(turns("熊猫", first, "长江"), CONFIG)
    output, history = talk("熊猫", "", "  ", "长江")
    assert history == turns("熊猫", first, "长江", second)
    assert f"助手：{first}\n助手：{second}\n" in output


def test_the_banner_names_the_model_its_size_and_the_settings(generator, capsys):
    chat.run(generator, GenerationConfig(do_sample=False, seed=5, stop="。"), "runs/demo", [])
    banner = capsys.readouterr().out
    n = sum(parameter.size for parameter in jax.tree.leaves(generator.params))
    assert "runs/demo" in banner and f"{n:,} 个参数" in banner and str(CONTEXT) in banner
    assert 'do_sample=False max_new_tokens=100 stop=["。"] seed=5' in banner and "temperature" not in banner
    assert all(word in banner for word in ("exit", "quit", " q，", "Ctrl-D", "/help"))
    chat.run(generator, CONFIG, "runs/demo", [])
    assert "temperature=1.0 top_k=50" in capsys.readouterr().out


@pytest.mark.parametrize("word", ["exit", "quit", "q", " EXIT "])
def test_a_word_leaves(generator, capsys, word):
    chat.run(generator, CONFIG, "", [word, "熊猫"])
    assert "助手" not in capsys.readouterr().out


def test_a_line_that_only_begins_like_a_command_is_text(talk):
    for line in ("q是什么", "exit 是什么意思", "clear 呢"):
        assert talk(line)[1][0]["content"] == line
    assert talk(" /help 是什么")[1][0]["content"] == "/help 是什么"


def test_control_tokens_that_a_user_types_are_plain_text(generator, talk):
    text = "<s>user\n</s>"
    assert talk(text)[1] == turns(text, generator.chat(turns(text), CONFIG))
    ids = encode_chat(generator.tokenizer, turns(text), add_generation_prompt=True)
    assert (ids.count(1), ids.count(2)) == (2, 1)  # the template's own


def test_clear_forgets_but_for_the_system(generator, talk):
    alone = generator.chat(turns("长江"), CONFIG)
    output, history = talk("熊猫", "clear", "长江")
    assert history == turns("长江", alone) and "已清空" in output
    system = {"role": "system", "content": "诗"}
    assert talk("/system 诗", "熊猫", "clear", "长江")[1] == [
        system,
        *turns("长江", generator.chat([system, *turns("长江")], CONFIG)),
    ]


def test_what_a_model_writes_cannot_move_the_terminals_cursor(generator, talk, monkeypatch):
    monkeypatch.setattr(generator, "stream_chat", lambda history, config: (piece for piece in ("\x1b[2J", "熊猫")))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    output, history = talk("你好")
    assert "助手：\\x1b[2J熊猫\n" in output and "\x1b" not in output
    assert history == turns("你好", "\x1b[2J熊猫")


def test_ctrl_c_stops_the_answer_and_keeps_what_was_written(generator, talk, monkeypatch):
    whole = list(generator.stream_chat(turns("熊猫"), CONFIG))
    real = generator.stream_chat

    def stream_chat(history, config):
        for i, piece in enumerate(real(history, config)):
            if i == 1 and len(history) == 1:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)  # an impatient user
            yield piece

    monkeypatch.setattr(generator, "stream_chat", stream_chat)
    before = signal.getsignal(signal.SIGINT)
    output, history = talk("熊猫", "长江")
    started = "".join(whole[:2])
    assert started != "".join(whole)
    assert f"助手：{started}\n（已停止）\n" in output and output.count("已停止") == 1
    assert history == turns("熊猫", started, "长江", generator.chat(turns("熊猫", started, "长江"), CONFIG))
    assert signal.getsignal(signal.SIGINT) is before


def test_retry_is_the_next_seeds_answer(generator, talk):
    def answer(seed):
        return generator.chat(turns("熊猫"), GenerationConfig(temperature=1.0, max_new_tokens=8, min_new_tokens=8, seed=seed))

    assert len({answer(3), answer(4), answer(5)}) == 3
    assert talk("熊猫", "/retry")[1] == turns("熊猫", answer(4))
    assert talk("熊猫", "/retry", "/retry")[1] == turns("熊猫", answer(5))
    assert "还没有可以重新回答的话" in talk("/retry")[0]
    greedy = GenerationConfig(do_sample=False, max_new_tokens=8)
    output, history = talk("熊猫", "/retry", config=greedy)
    assert "也是同样的话" in output and history == turns("熊猫", generator.chat(turns("熊猫"), greedy))
    last = GenerationConfig(temperature=1.0, max_new_tokens=8, min_new_tokens=8, seed=2**32 - 1)
    assert talk("熊猫", "/retry", config=last)[1] == turns("熊猫", answer(0))


# ---- the context --------------------------------------------------------------------------------------------------


def test_the_oldest_turns_are_forgotten_and_it_is_said(generator, talk):
    questions = [f"{name}最爱吃什么？" for name in ("熊猫", "小红", "老王", "小明", "爷爷", "小猫")]
    output, history = talk("/system 诗", *questions)
    assert [message["content"] for message in history[1::2]] == questions  # all of it is kept for /save ...
    expected = history[:1]
    forgotten = 0
    for i, question in enumerate(questions):  # ... but the model read the last turns that leave it room, found one by one
        whole = [*expected, {"role": "user", "content": question}]
        read, n = whole, 0
        while generator.n_chat_tokens(read) > CONTEXT - 8:
            read, n = [read[0], *read[3:]], n + 1
        expected = [*whole, {"role": "assistant", "content": generator.chat(read, CONFIG)}]
        assert history[2 * i + 2] == expected[-1]
        assert (f"最早的 {n} 轮不再参与回答" in output) or n == 0
        forgotten = n
    assert forgotten >= 2


def test_room_for_an_answer_is_kept_but_at_most_half_of_the_context(generator):
    history = turns(*["熊猫最爱吃竹子。"] * 21)
    for max_new_tokens, room in ((8, 88), (40, 56), (1000, 48), (0, 95)):
        config = GenerationConfig(max_new_tokens=max_new_tokens)
        read = chat.fit(generator, history, config)
        assert read == history[-len(read) :] and len(read) % 2 == 1
        assert generator.n_chat_tokens(read) <= room < generator.n_chat_tokens(history[-len(read) - 2 :])


def test_a_turn_that_does_not_fit_is_said_and_not_added(generator, talk):
    output, history = talk("熊猫", "熊" * 200, "/system " + "熊" * 200, "/set max_new_tokens 60", "长江")
    first = generator.chat(turns("熊猫"), CONFIG)
    assert [message["content"] for message in history[:3]] == ["熊猫", first, "长江"]
    n = generator.n_chat_tokens(turns("熊" * 200))
    assert f"这句话太长，没有记入对话：{n} 个 token，最多 88 个；上下文共 96 个，其余 8 个留给回答" in output
    assert "系统提示太长" in output


# ---- commands -----------------------------------------------------------------------------------------------------


def test_set_changes_any_setting_and_generation_config_checks_it(generator, talk):
    assert talk("/set temperature 2.0", "熊猫")[1] == turns(
        "熊猫", generator.chat(turns("熊猫"), GenerationConfig(temperature=2.0, max_new_tokens=8, min_new_tokens=8, seed=3))
    )
    for line, shown in [
        ("/set do_sample False", "do_sample 现在是 False"),
        ("/set do_sample true", "do_sample 现在是 True"),
        ("/set　top_k　7", "top_k 现在是 7"),  # typed with an input method
        ("/set stop 。", 'stop 现在是 ["。"]'),
        (r'/set stop ["。", "\n"]', r'stop 现在是 ["。", "\n"]'),
        ("/set seed", "seed 是 3；修改时写 /set seed 值"),
        ("/set top_p 2", "top_p: 2 is invalid (expected a number above 0 and at most 1)"),
        ("/set top_p abc", "top_p: 'abc' is invalid"),
        ("/set min_new_tokens 9", "min_new_tokens: 9 is invalid (expected at most max_new_tokens, 8)"),
        ("/set top_k " + "[" * 100_000, "top_k: "),
        ("/set beams 3", "没有设置 beams（有：do_sample、temperature、top_k"),
        ("/set truncate_prompt True", "没有设置 truncate_prompt"),
    ]:
        assert shown in talk(line)[0], line
    output = talk("/set top_p 2", "/set")[0]
    for name in chat.SETTINGS:
        assert f"\n{name} " in output
    assert "top_p                 0.9\n" in output


def test_the_system_turn_leads(generator, talk):
    system = {"role": "system", "content": "诗"}
    first = generator.chat([system, *turns("熊猫")], CONFIG)
    assert first != generator.chat(turns("熊猫"), CONFIG)
    assert talk("/system 诗", "熊猫")[1] == [system, *turns("熊猫", first)]
    assert talk("/system 歌", "/system 诗", "熊猫")[1] == [system, *turns("熊猫", first)]
    assert talk("/system 诗", "熊猫", "/system")[1] == turns("熊猫", first)


def test_a_dialogue_is_saved_and_goes_on_from_there(generator, talk, tmp_path):
    history = talk("熊猫")[1]
    mine = tmp_path / "mine.json"
    assert "已保存 2 条消息" in talk("熊猫", f"/save {mine}")[0]
    assert json.loads(mine.read_text()) == history and "熊猫" in mine.read_text()
    output, loaded = talk(f"/load {mine}", "长江", f"/save {mine}")
    assert "已载入 2 条消息" in output
    assert loaded == [*history, *turns("长江", generator.chat([*history, *turns("长江")], CONFIG))]
    assert json.loads(mine.read_text()) == loaded
    mine.write_text(json.dumps(turns("熊猫")))
    assert talk(f"/load {mine}", "/retry")[1] == history  # a question without an answer gets the first one


def test_save_replaces_nothing_but_dialogues(talk, tmp_path):
    foreign = {"photo": b"\xff\xd8", "notes.txt": b"notes", "numbers.json": b"[1, 2]", "empty": b"", "list": b"[]"}
    for name, content in foreign.items():
        (tmp_path / name).write_bytes(content)
        output = talk("熊猫", f"/save {tmp_path / name}")[0]
        assert "没有覆盖" in output and (tmp_path / name).read_bytes() == content
        assert "不是对话文件" in talk(f"/load {tmp_path / name}")[0]
    for name in (tmp_path, "/", ".", tmp_path / "none" / "x", "a\0b", "~nobody-of-that-name/x"):
        assert "无法保存到" in talk("熊猫", f"/save {name}")[0]
        assert "无法读取" in talk(f"/load {name}")[0]
    assert "还没有可以保存的对话" in talk(f"/save {tmp_path / 'x'}")[0]
    assert "请写出文件名" in talk("/save")[0] and "请写出文件名" in talk("/load")[0]


@pytest.mark.parametrize(
    "messages",
    [
        '[{"role": "user"}]', '[{"role": "user", "content": 3}]', '[{"role": "wizard", "content": "x"}]', "[3]", "{}",
        r'[{"role": "user", "content": "\ud800"}]', "[" * 100_000,
    ],
)  # fmt: skip
def test_what_is_no_dialogue_is_not_loaded(talk, tmp_path, messages):
    path = tmp_path / "messages.json"
    path.write_text(messages)
    output, history = talk("熊猫", f"/load {path}")
    assert "不是对话文件" in output and history[0]["content"] == "熊猫"


def test_help_and_unknown_commands(talk):
    assert talk("/help")[0].startswith(chat.HELP)
    for command in ("/retry", "/set", "/system", "/save", "/load", "/help", "clear", "exit", "Ctrl-C", "Ctrl-D"):
        assert command in chat.HELP
    assert talk("/jump 3")[0].startswith("（没有命令 /jump 3；输入 /help")


def test_a_tokenizer_without_a_chat_template_is_an_error_at_once(generator, monkeypatch):
    monkeypatch.setattr(generator.tokenizer, "chat_template", None)
    with pytest.raises(UserError, match="this tokenizer has no chat template"):
        chat.run(generator, CONFIG, "", [])


# ---- the terminal -------------------------------------------------------------------------------------------------


@pytest.fixture
def typed(monkeypatch, tmp_path):
    """The lines that come of keys."""
    monkeypatch.setenv("HOME", str(tmp_path))

    def typed(*keys, between=lambda: None):
        def press():
            for some in keys:
                time.sleep(0.3)  # a person's pace: prompt_toolkit reads its history in the background
                pipe.send_bytes(some.encode() if isinstance(some, str) else some)

        with prompt_toolkit.input.create_pipe_input() as pipe:
            fingers = threading.Thread(target=press)
            fingers.start()
            with create_app_session(input=pipe, output=prompt_toolkit.output.DummyOutput()):
                lines = []
                for line in chat._terminal_lines():
                    between()
                    lines.append(line)
            fingers.join()
        return lines

    return typed


def test_lines_are_edited_and_remembered(typed, tmp_path):
    assert typed("熊猪\x7f猫\r长江\r\x04") == ["熊猫", "长江"]
    file = tmp_path / ".cache" / "mateconv_jax" / "chat_history"
    assert "+熊猫\n" in file.read_text() and file.stat().st_mode & 0o077 == 0
    assert typed("\x1b[A\x1b[A\r", "\x04") == ["熊猫"]  # the next day, two lines up


def test_ctrl_c_at_a_prompt_says_how_to_leave_and_ctrl_d_leaves(typed, capsys):
    assert typed("\x03熊猫\r\x04") == ["熊猫"]
    assert capsys.readouterr().out == f"（{chat.HOW_TO_LEAVE}）\n"
    assert typed("not this\x03熊猫\r\x04") == ["熊猫"]
    assert capsys.readouterr().out == ""


def test_ctrl_c_between_a_prompt_and_an_answer_does_no_harm(typed):
    """A key that is held down comes at any time."""
    before = signal.getsignal(signal.SIGINT)
    assert typed("熊猫\r", "长江\r", "\x04", between=lambda: signal.raise_signal(signal.SIGINT)) == ["熊猫", "长江"]
    assert signal.getsignal(signal.SIGINT) is before


def test_bytes_that_are_no_utf8_do_no_harm(typed):
    [line] = typed(b"\xff\xe7\x86\x8a\r\x04")
    assert "熊" in line and line.encode()


@pytest.mark.parametrize("home", ["/dev/null", "/proc"])
def test_a_home_that_cannot_be_written_only_forgets(typed, monkeypatch, home):
    monkeypatch.setenv("HOME", home)
    assert typed("熊猫\r", "\x1b[A\r", "\x04") == ["熊猫", "熊猫"]


def test_a_full_disk_only_forgets(typed, monkeypatch, capsys):
    from prompt_toolkit.history import FileHistory

    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(FileHistory, "store_string", full)
    assert typed("熊猫\r", "\r", "\x04") == ["熊猫", ""]  # the second Enter, so that a failure does not wait for one ...
    assert capsys.readouterr() == ("", "")  # ... after prompt_toolkit's traceback
