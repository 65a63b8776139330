"""Interactive chat in the terminal. Its interface is Chinese, like the models; errors about settings are GenerationConfig's."""

import bisect
import contextlib
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import orjson

from mateconv_jax import files
from mateconv_jax.data.text.dialogue import is_dialogue
from mateconv_jax.data.text.jsonl import parse_text
from mateconv_jax.data.text.rejected import Rejected
from mateconv_jax.errors import UserError
from mateconv_jax.generation_config import GenerationConfig
from mateconv_jax.terminal import visible

ROLES = ("system", "user", "assistant")
# Without truncate_prompt: a dialogue is shortened by whole turns.
SETTINGS = [field.name for field in dataclasses.fields(GenerationConfig) if field.name != "truncate_prompt"]
HOW_TO_LEAVE = "输入 exit、quit 或 q，或按 Ctrl-D 离开"
HELP = """\
exit  quit  q             离开（Ctrl-D 也可以）
clear                     清空对话，系统提示保留
/retry                    换下一个种子，重新回答最后一句
/set                      查看全部设置
/set temperature 0.5      修改一项设置；几个停止文本写作 /set stop ["。", "\\n"]
/system 内容              设定系统提示；不写内容则取消
/save 文件                把对话存为 JSON
/load 文件                载入存过的对话
/help                     显示这些说明
回答时按 Ctrl-C 只停止这次回答。要说以 / 开头的话，请在前面加一个空格。"""


def run(generator, config: GenerationConfig = GenerationConfig(), name: str = "", lines: Iterable[str] | None = None) -> None:
    """Answer the user line by line, until input ends or a line says to quit.

    Args:
      generator: a TextGenerator.
      name: the model's name in the banner.
      lines: the user's input; None reads the terminal, or standard input if that is not a terminal.

    Raises:
      UserError: the tokenizer has no chat template.
    """
    generator.n_chat_tokens([{"role": "user", "content": ""}])
    chat = Chat(generator, config)
    print(chat.banner(name))
    if lines is None:
        lines = _terminal_lines() if sys.stdin.isatty() and sys.stdout.isatty() else _plain_lines()
    for line in lines:
        words = line.split(maxsplit=1)
        command, argument = words[0] if words else "", words[1].strip() if len(words) > 1 else ""
        try:
            if line.strip().lower() in ("exit", "quit", "q"):
                break
            elif line.strip().lower() == "clear":
                chat.clear()
            elif not line.startswith("/"):
                chat.ask(line.strip())
            elif command == "/retry" and not argument:
                chat.retry()
            elif command == "/set":
                chat.change(*argument.split(maxsplit=1))
            elif command == "/system":
                chat.system(argument)
            elif command == "/save":
                chat.save(argument)
            elif command == "/load":
                chat.load(argument)
            elif command == "/help" and not argument:
                print(HELP)
            else:
                _notice(f"没有命令 {line.strip()}；输入 /help 查看全部命令")
        except UserError as error:
            _notice(str(error))


class Chat:
    """A dialogue and the settings it is answered with. A failed command prints a notice and leaves the dialogue unchanged.

    Attributes:
      generator: a TextGenerator.
      config: the current settings.
      history: the full dialogue; the model reads as many of its most recent turns as fit.
    """

    def __init__(self, generator, config: GenerationConfig):
        self.generator, self.config = generator, config
        self.history: list[dict[str, str]] = []
        self._n_forgotten = 0  # oldest turns that no longer fit; the user is told when it grows

    def banner(self, name: str) -> str:
        n_parameters = sum(parameter.size for _, parameter in self.generator.params.flat_state())
        always = {"max_new_tokens", "seed"} | ({"temperature", "top_k", "top_p"} if self.config.do_sample else set())
        values = {name: getattr(self.config, name) for name in SETTINGS}
        shown = {name: value for name, value in values.items() if name in always or value != getattr(GenerationConfig(), name)}
        return (
            f"模型：{name}（{n_parameters:,} 个参数，上下文 {self.generator.max_seq_len} 个 token）\n"
            f"设置：{' '.join(f'{name}={_shown(value)}' for name, value in shown.items())}\n"
            f"{HOW_TO_LEAVE}；clear 清空对话，/help 查看全部命令\n"
        )

    # ---- turns --------------------------------------------------------------------------------------------------------

    def ask(self, text: str) -> None:
        if text:
            self._answer([*self.history, {"role": "user", "content": text}])

    def retry(self) -> None:
        """Answer the last turn again with the next seed, which then stays."""
        question = self.history[:-1] if self.history and self.history[-1]["role"] == "assistant" else self.history
        if not question or question[-1]["role"] != "user":
            _notice("还没有可以重新回答的话")
        elif question is self.history:
            self._answer(question)
        elif not self.config.do_sample:
            _notice("do_sample 是 False，再答一次也是同样的话；可先 /set do_sample True")
        else:
            self.config = dataclasses.replace(self.config, seed=(self.config.seed + 1) % 2**32)
            self._answer(question)

    def _answer(self, history: list[dict[str, str]]) -> None:
        try:
            read = fit(self.generator, history, self.config)
        except DoesNotFit as error:
            context = self.generator.max_seq_len
            _notice(
                f"这句话太长，没有记入对话：{error.n_tokens} 个 token，最多 {error.room} 个；上下文共 {context} 个，"
                f"其余 {context - error.room} 个留给回答"
            )
            return
        n_forgotten = _n_turns(history) - _n_turns(read)
        if n_forgotten > self._n_forgotten:
            _notice(f"对话超出了上下文，最早的 {n_forgotten} 轮不再参与回答")
        self._n_forgotten = n_forgotten

        pieces, answer, pressed = self.generator.stream_chat(read, self.config), [], []
        print("助手：", end="", flush=True)
        with _on_ctrl_c(lambda *_: pressed.append(True)):
            for piece in pieces:
                print(visible(piece), end="", flush=True)
                answer.append(piece)
                if pressed:
                    break
            pieces.close()
        print()
        if pressed:
            _notice("已停止")
        self.history = [*history, {"role": "assistant", "content": "".join(answer)}]

    # ---- commands -----------------------------------------------------------------------------------------------------

    def clear(self) -> None:
        self.history = [message for message in self.history[:1] if message["role"] == "system"]
        self._n_forgotten = 0
        _notice("对话已清空" + ("，系统提示保留" if self.history else ""))

    def change(self, name: str = "", value: str = "") -> None:
        if not name:
            for name in SETTINGS:
                print(f"{name:<22}{_shown(getattr(self.config, name))}")
        elif name not in SETTINGS:
            _notice(f"没有设置 {name}（有：{'、'.join(SETTINGS)}）")
        elif not value:
            _notice(f"{name} 是 {_shown(getattr(self.config, name))}；修改时写 /set {name} 值")
        else:
            self.config = dataclasses.replace(self.config, **{name: _value(value)})
            _notice(f"{name} 现在是 {_shown(getattr(self.config, name))}")

    def system(self, text: str) -> None:
        turns = self.history[1:] if self.history and self.history[0]["role"] == "system" else self.history
        new = [{"role": "system", "content": text}] if text else []
        try:
            fit(self.generator, [*new, {"role": "user", "content": ""}], self.config)
        except DoesNotFit as error:
            _notice(f"系统提示太长：{error.n_tokens} 个 token，最多 {error.room} 个")
            return
        self.history = [*new, *turns]
        _notice("系统提示已设定" if new else "没有系统提示了")

    def save(self, name: str) -> None:
        if not name or not self.history:
            _notice("还没有可以保存的对话" if name else "请写出文件名：/save 文件")
            return
        try:
            path = Path(name).expanduser()
            if path.exists() and _dialogue(path.read_bytes()) is None:
                _notice(f"{path} 已经存在，而且不是对话文件，没有覆盖；请换一个文件名")
                return
            files.write_text(path, json.dumps(self.history, ensure_ascii=False, indent=2) + "\n")
        except (OSError, ValueError, RuntimeError) as error:  # no such folder; invalid file name; ~USER without a home
            _notice(f"无法保存到 {name}（{error}）")
            return
        _notice(f"已保存 {len(self.history)} 条消息到 {path}")

    def load(self, name: str) -> None:
        if not name:
            _notice("请写出文件名：/load 文件")
            return
        try:
            history = _dialogue(Path(name).expanduser().read_bytes())
        except (OSError, ValueError, RuntimeError) as error:
            _notice(f"无法读取 {name}（{error}）")
            return
        if history is None:
            _notice(f'{name} 不是对话文件（应为 [{{"role": "user", "content": "…"}}, …]，角色有 {"、".join(ROLES)}）')
            return
        self.generator.n_chat_tokens(history)  # raises if the template rejects it
        self.history, self._n_forgotten = history, 0
        _notice(f"已载入 {len(history)} 条消息")


# ---- the context ------------------------------------------------------------------------------------------------------


class DoesNotFit(Exception):
    """The system prompt and the last turn alone leave no room for an answer.

    Attributes:
      n_tokens: their length.
      room: the most that would fit.
    """

    def __init__(self, n_tokens: int, room: int):
        super().__init__(f"{n_tokens} tokens, and at most {room} fit")
        self.n_tokens, self.room = n_tokens, room


def fit(generator, history: list[dict[str, str]], config: GenerationConfig) -> list[dict[str, str]]:
    """Drop the oldest turns until the dialogue leaves room for an answer of max_new_tokens, or of half the context if that is
    less. A turn is a user message and everything up to the next; a leading system message is kept.

    Raises:
      DoesNotFit: even the last turn alone is too long.
    """
    room = generator.max_seq_len - max(1, min(config.max_new_tokens, generator.max_seq_len // 2))
    n_system = int(history[0]["role"] == "system")

    def n_tokens(start: int) -> int:
        return generator.n_chat_tokens(history[:n_system] + history[start:])

    later = [i for i, message in enumerate(history) if message["role"] == "user" and i > n_system]
    starts = [n_system, *later]
    first = bisect.bisect_left(starts, True, key=lambda start: n_tokens(start) <= room)
    if first == len(starts):
        raise DoesNotFit(n_tokens(starts[-1]), room)
    return history[:n_system] + history[starts[first] :]


def _n_turns(history: list[dict[str, str]]) -> int:
    return sum(message["role"] == "user" for message in history)


# ---- parsing user input -----------------------------------------------------------------------------------------------


def _value(text: str) -> Any:
    """Parse a setting's value: JSON if it parses, otherwise the text itself. GenerationConfig validates it."""
    try:
        return json.loads({"True": "true", "False": "false"}.get(text, text))
    except (ValueError, RecursionError):
        return text


def _shown(value) -> str:
    """The inverse of `_value`."""
    return str(value) if isinstance(value, bool) else json.dumps(value, ensure_ascii=False)


def _dialogue(content: bytes) -> list[dict[str, str]] | None:
    """The messages in a saved dialogue's JSON, or None if it is not one."""
    try:
        messages = orjson.loads(content)
    except orjson.JSONDecodeError:
        return None
    if not is_dialogue(messages) or any(message["role"] not in ROLES for message in messages):
        return None
    return [{"role": message["role"], "content": message["content"]} for message in messages]


# ---- the terminal -----------------------------------------------------------------------------------------------------


def _notice(text: str) -> None:
    print(visible(f"（{text}）"))


@contextlib.contextmanager
def _on_ctrl_c(handler) -> Generator[None]:
    """Handle Ctrl-C with `handler` inside the block. A KeyboardInterrupt could be raised anywhere in JAX, and a second one
    anywhere in the clean-up after the first.
    """
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _plain_lines() -> Iterator[str]:
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield parse_text(line).rstrip("\r\n")
        except Rejected as error:
            _notice(f"第 {number} 行不是 UTF-8，已跳过（{error}）")


def _terminal_lines() -> Iterator[str]:
    """Lines with editing and history, until Ctrl-D. Only this function uses prompt_toolkit."""
    # No cursor position requests: the terminal's reply could arrive in the middle of the model's output.
    os.environ.setdefault("PROMPT_TOOLKIT_NO_CPR", "1")
    import prompt_toolkit
    from prompt_toolkit import history

    class ChatHistory(history.FileHistory):
        def store_string(self, string):
            with contextlib.suppress(OSError):  # a full disk must not end the chat
                super().store_string(string)

    try:
        path = Path.home() / ".cache" / "mateconv_jax" / "chat_history"
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        session = prompt_toolkit.PromptSession(history=ChatHistory(path))
    except (OSError, RuntimeError):  # no home directory, or not writable
        session = prompt_toolkit.PromptSession()
    with _on_ctrl_c(signal.SIG_IGN):  # ignored between turns; in the prompt it is a key press, and _answer has its own handler
        while True:
            try:
                line = session.prompt("你：")
            except KeyboardInterrupt:
                if not session.default_buffer.text:
                    _notice(HOW_TO_LEAVE)
                continue
            except EOFError:
                return
            # prompt_toolkit turns invalid UTF-8 bytes into lone surrogates, which must not reach the tokenizer.
            yield line.encode(errors="replace").decode()
