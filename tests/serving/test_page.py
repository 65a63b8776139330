"""The chat page in headless Chromium.

It talks to a scripted server, and once to the real one. Needs Playwright (`pip install playwright`) and Debian's chromium, and is
skipped without.
"""

import re
import shutil
import time

import pytest
from starlette.applications import Starlette

from mateconv_jax.serving.app import Service, make_app
from mateconv_jax.serving.guard import Access, Status
from tests.serving.scripted_server import CONTEXT, MARKDOWN, InThread, Script

FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"
    " --disable-sync"
).split()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=FLAGS)  # in a fresh profile
        yield browser
        browser.close()


@pytest.fixture
def script():
    return Script()


@pytest.fixture
def server(script):
    server = InThread(Starlette(routes=script.routes()))
    yield server
    script.go_on.set()
    server.stop()


class Page:
    """A tab of its own profile. What goes wrong in it, and requests to other hosts, fail the test."""

    def __init__(self, browser, url, **options):
        self.context = browser.new_context(**options)
        self.context.grant_permissions(["clipboard-read", "clipboard-write"])
        self.tab = self.context.new_page()
        self.tab.set_default_timeout(10_000)
        self.errors, self.hosts = [], set()
        self.tab.on("pageerror", lambda error: self.errors.append(str(error)))
        self.tab.on("console", lambda message: self.errors.append(message.text) if "Content Security" in message.text else None)
        self.tab.on("request", lambda request: self.hosts.add(request.url.split("/")[2]))
        self.tab.goto(url)
        self.tab.wait_for_selector(".welcome")

    def ask(self, text, wait=True):
        self.tab.fill("#input", text)
        self.tab.press("#input", "Enter")
        if wait:
            self.tab.wait_for_selector("#send:visible")

    @property
    def answers(self):
        return [node.inner_text() for node in self.tab.query_selector_all(".answer > .text")]

    @property
    def questions(self):
        return [node.inner_text() for node in self.tab.query_selector_all(".question > .text")]

    def wait_for(self, text):
        self.until("text => document.body.innerText.includes(text)", text)

    def until(self, expression, argument=None):
        """Playwright's wait_for_function is an eval(), which the page's policy forbids."""
        deadline = time.monotonic() + 10
        while not self.tab.evaluate(expression, argument):
            assert time.monotonic() < deadline, (expression, argument, self.tab.inner_text("body"))
            self.tab.wait_for_timeout(20)


@pytest.fixture
def page(browser, server):
    page = Page(browser, server.url)
    yield page
    page.context.close()
    assert page.errors == [] and page.hosts == {f"localhost:{server.port}"}


@pytest.mark.slow
def test_a_dialogue_survives_a_reload(page, script):
    page.ask("你好")
    page.ask("再见")
    assert page.answers == ["回答：你好", "回答：再见"]
    assert [message["content"] for message in script.requests[-1]["messages"]] == ["你好", "回答：你好", "再见"]
    assert re.search(r"5 个 token · \d+ token/s", page.tab.inner_text(".answer:last-child .stats"))
    assert page.tab.inner_text("#context") == f"上下文 {2 + 5 + 2 + 12 + 5} / {CONTEXT}"
    page.tab.reload()
    page.wait_for("回答：再见")
    assert page.questions == ["你好", "再见"] and page.answers == ["回答：你好", "回答：再见"]
    page.tab.click("#new")
    assert page.answers == []
    page.ask("第二个")
    assert [node.inner_text() for node in page.tab.query_selector_all("#list .open")] == ["第二个", "你好"]
    page.tab.click("#list .item:last-child .open")
    assert page.questions == ["你好", "再见"]


@pytest.mark.slow
def test_deleting_a_conversation_can_be_undone(page):
    page.ask("你好")
    page.tab.hover("#list .item")
    page.tab.click("#list [data-action=remove]")
    page.wait_for("已删除「你好」")
    assert page.answers == [] and not page.tab.query_selector("#list .item")
    page.tab.click("#toast button")
    assert page.answers == ["回答：你好"]
    page.tab.reload()
    page.wait_for("回答：你好")


@pytest.mark.slow
def test_a_conversation_deleted_while_it_is_answered_stays_deleted(page, script):
    page.ask("慢", wait=False)
    page.wait_for("一二三")
    page.tab.hover("#list .item")
    page.tab.click("#list [data-action=remove]")
    page.tab.wait_for_timeout(200)
    page.tab.reload()
    page.tab.wait_for_selector(".welcome")
    assert not page.tab.query_selector("#list .item")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_keeps_what_is_there_and_tells_the_server(page, script, how):
    page.ask("慢", wait=False)
    page.wait_for("一二三")
    if how == "button":
        page.tab.click("#stop")
    else:
        page.tab.press("#input", "Escape")
    page.wait_for("已停止")
    assert page.answers == ["一二三"]
    deadline = time.monotonic() + 5
    while not script.cancelled:
        assert time.monotonic() < deadline
        page.tab.wait_for_timeout(20)
    page.ask("继续")
    assert [message["content"] for message in script.requests[-1]["messages"]] == ["慢", "一二三", "继续"]


@pytest.mark.slow
def test_a_reload_in_the_middle_keeps_the_beginning(page, script):
    page.ask("慢", wait=False)
    page.wait_for("一二三")
    page.tab.reload()
    page.wait_for("页面关闭时回答还没有结束")
    assert page.answers == ["一二三"]
    script.go_on.set()
    page.tab.click("[data-action=retry]")
    page.wait_for("一二三四五六")


@pytest.mark.slow
def test_regenerate_and_edit_ask_again_from_there(page, script):
    page.ask("一")
    page.ask("二")
    page.tab.click(".answer:last-child [data-action=regenerate]")
    page.tab.wait_for_selector("#send:visible")
    first, second = script.requests[-2:]
    assert first["messages"] == second["messages"] and first["seed"] != second["seed"]
    page.tab.press("#input", "ArrowUp")
    page.tab.press(".editor textarea", "Escape")
    assert not page.tab.query_selector(".editor")
    page.tab.hover(".question")
    page.tab.click(".question [data-action=edit]")
    assert "后面的 3 条消息会被删除" in page.tab.inner_text(".editor")
    page.tab.fill(".editor textarea", "改")
    page.tab.press(".editor textarea", "Enter")
    page.wait_for("回答：改")
    assert page.questions == ["改"] and page.answers == ["回答：改"]


@pytest.mark.slow
def test_copying_an_answer_and_its_code(page):
    page.ask("格式")
    assert page.tab.inner_text(".answer h1") == "标题" and page.tab.query_selector(".answer td")
    assert page.tab.inner_text(".hljs-keyword") == "def"
    page.tab.click(".answer .row [data-action=copy]")
    assert page.tab.evaluate("navigator.clipboard.readText()") == MARKDOWN
    page.tab.click("[data-action=copy-code]")
    assert page.tab.evaluate("navigator.clipboard.readText()") == "def f(x):\n    return x + 1"


@pytest.mark.slow
def test_what_a_model_writes_is_never_run(page):
    page.ask("脚本")
    page.tab.hover(".answer pre >> nth=-1")
    assert page.tab.evaluate("window.hacked") is None
    assert (
        page.tab.evaluate("document.querySelectorAll('.answer :is(script, img, [onclick], [onerror], [onmouseover])').length")
        == 0
    )
    assert "<script>window.hacked = 1</script>" in page.answers[0]  # shown as it is
    links = page.tab.evaluate("[...document.querySelectorAll('.answer a')].map(a => a.getAttribute('href'))")
    assert links == [None, "http://example.invalid/leak.png"]
    page.ask("<img src=x onerror='window.hacked = 7'>")
    assert page.tab.evaluate("window.hacked") is None
    # Behind the sanitiser stands the browser: no string becomes HTML, no other script runs.
    refused = "() => { try { document.body.innerHTML = '<b>x</b>'; return false } catch { return true } }"
    assert page.tab.evaluate(refused)
    page.errors.clear()


@pytest.mark.slow
def test_a_line_of_20000_characters_wraps_and_stays_quick(page):
    begin = time.monotonic()
    page.ask("长行")
    page.until("document.querySelector('.answer .text').textContent.trim().length === 20000")
    assert time.monotonic() - begin < 8
    assert page.tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.tab.evaluate("document.querySelector('.answer').scrollWidth <= document.querySelector('#messages').clientWidth")


@pytest.mark.slow
def test_deeply_nested_markdown_is_shown_all_the_same(page):
    seconds = """async () => {
      const { render } = await import("./page/markdown.js");
      const texts = [">".repeat(20000), "[".repeat(20000), "*a ".repeat(7000), "- ".repeat(5000) + "x", "`".repeat(20000), "|a".repeat(9000)];
      const begin = performance.now();
      for (const text of texts) if (!(render(text) instanceof Node)) throw Error("nothing");
      return (performance.now() - begin) / 1000;
    }"""
    assert page.tab.evaluate(seconds) < 8


@pytest.mark.slow
def test_a_lost_connection_keeps_the_answer_and_the_retry_goes_on_from_it(page, script):
    page.ask("断", wait=False)
    page.wait_for("连接中断")
    assert page.answers == ["一二三"]
    script.breaks = False
    page.tab.click("[data-action=retry]")
    page.wait_for("一二三四五六")
    assert page.answers == ["一二三四五六"] and not page.tab.query_selector(".problem")
    first, second = script.requests
    assert first == second  # the seed as well: the same text


@pytest.mark.slow
def test_a_stream_that_ends_without_its_last_event_was_cut_off(page):
    page.ask("半")
    page.wait_for("连接中断")
    assert page.answers == ["一二三"]


@pytest.mark.slow
def test_a_server_that_goes_away_and_comes_back(browser, script):
    server = InThread(Starlette(routes=script.routes()))
    page = Page(browser, server.url)
    page.ask("你好")
    server.stop()
    page.ask("在吗", wait=False)
    page.wait_for("连不上服务器。")
    assert page.tab.inner_text("#banner") == "连不上服务器，正在重试……"
    server = InThread(Starlette(routes=script.routes()), server.port)
    page.tab.wait_for_selector("#banner", state="hidden")
    page.tab.click("[data-action=retry]")
    page.wait_for("回答：在吗")
    page.context.close()
    server.stop()


@pytest.mark.slow
def test_a_busy_server_says_when_to_try_again(page, script):
    page.ask("忙")
    page.wait_for("服务器正忙，请 7 秒后重试")
    page.ask("你好")  # the question without an answer is not sent again
    assert page.answers[-1] == "回答：你好"
    assert script.requests[-1]["messages"] == [{"role": "user", "content": "你好"}]


@pytest.mark.slow
def test_the_oldest_turns_are_left_out_and_the_page_says_so(page, script):
    for i in range(6):
        page.ask(f"{i}" * 15)
    sent = [message["content"] for message in script.requests[-1]["messages"]]
    assert sent[-1] == "5" * 15 and sent[0] != "0" * 15 and script.requests[-1]["messages"][0]["role"] == "user"
    page.wait_for("上下文已满：以上消息不再发送给模型")
    below = page.tab.evaluate("document.querySelector('.left-out').nextElementSibling.querySelector('.text').innerText")
    assert below == sent[0]
    page.ask("长" * 300)
    page.wait_for(f"这个问题有 304 个 token，上下文只有 {CONTEXT} 个")


@pytest.mark.slow
def test_settings_reach_the_request(page, script):
    page.tab.click("#open-settings")
    page.tab.fill("#system", "简洁。")
    page.tab.select_option("#preset", "factual")
    page.tab.fill("[name=seed]", "7")
    page.tab.fill("[name=temperature]", "9")
    assert page.tab.inner_text(".invalid >> nth=0") == "请输入 0 到 2 之间的数。"
    page.tab.press("#settings", "Escape")
    page.ask("你好")
    body = script.requests[-1]
    assert body["messages"][0] == {"role": "system", "content": "简洁。"}
    assert (body["temperature"], body["top_k"], body["top_p"], body["seed"]) == (0.5, 20, 0.85, 7)
    page.tab.click("#open-settings")
    assert page.tab.input_value("#preset") == "factual" and page.tab.input_value("#system") == "简洁。"
    page.tab.fill("[name=top_k]", "3")
    assert page.tab.input_value("#preset") == "own"
    page.tab.select_option("#preset", "server")
    page.tab.press("#settings", "Escape")
    page.ask("你好")
    assert "temperature" not in script.requests[-1] and script.requests[-1]["seed"] == 7


@pytest.mark.slow
def test_enter_belongs_to_the_input_method_while_it_composes(page, script):
    page.tab.fill("#input", "ni hao")
    key = "new KeyboardEvent('keydown', {key: 'Enter', bubbles: true, cancelable: true, %s})"
    for composing in ("isComposing: true", "keyCode: 229"):
        page.tab.evaluate(f"document.querySelector('#input').dispatchEvent({key % composing})")
    page.tab.press("#input", "Shift+Enter")
    page.tab.wait_for_timeout(200)
    assert script.requests == [] and page.tab.input_value("#input") == "ni hao\n"
    page.tab.press("#input", "Enter")
    page.wait_for("回答：ni hao")


@pytest.mark.slow
def test_language_and_theme_are_kept(page):
    assert page.tab.inner_text("#hint").startswith("Enter 发送")
    page.tab.click("#language")
    page.tab.click("#theme")
    page.tab.click("#theme")
    page.tab.reload()
    assert page.tab.inner_text("#hint").startswith("Enter sends") and page.tab.evaluate("document.documentElement.lang") == "en"
    assert page.tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(23, 27, 25)"
    assert not re.search(r"[\u4e00-\u9fff]", page.tab.inner_text("#chat"))


@pytest.mark.slow
def test_reasoning_is_apart_from_the_answer(page, script):
    page.ask("想")
    assert page.answers == ["回答：想"] and page.tab.text_content("details .text") == "让我想想"
    page.ask("好")
    assert script.requests[-1]["messages"][1] == {"role": "assistant", "content": "回答：想"}


@pytest.mark.slow
def test_on_a_phone_nothing_is_wider_than_the_screen(browser, server):
    page = Page(browser, server.url, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    for question in ("格式", "脚本"):
        page.tab.fill("#input", question)
        page.tab.press("#input", "Enter")  # a new line: phones have no Shift+Enter
        assert page.tab.input_value("#input") == f"{question}\n"
        page.tab.click("#send")
        page.tab.wait_for_selector("#send:visible")
    assert len(page.answers) == 2 and page.tab.evaluate("document.documentElement.scrollWidth") == 390
    page.tab.click("#menu")
    page.tab.click("#list .open")
    page.tab.click("#input")
    page.context.close()


@pytest.mark.slow
def test_the_real_server_with_a_key(browser, generator, engine):
    service = Service(generator, engine, "tiny", 4, status=Status("loading"), access=Access(keys=("secret",)))
    server = InThread(make_app(service))
    page = Page(browser, server.url)
    page.wait_for("模型加载中")
    service.status.reason = None
    page.wait_for("这个服务器需要 API 密钥。")
    page.tab.fill("#key", "wrong")
    page.tab.click("#ask-key .primary")
    page.wait_for("密钥不对")
    page.tab.fill("#key", "secret")
    page.tab.click("#ask-key .primary")
    page.until("document.querySelector('#model').textContent === 'tiny'")
    for i in range(4):  # of 96 tokens of context
        page.ask(f"小明喜欢什么？{i}")
    assert len(page.answers) == 4 and not page.tab.query_selector(".problem")
    assert page.tab.query_selector(".left-out")
    assert re.fullmatch(r"上下文 \d+ / 96", page.tab.inner_text("#context"))
    page.tab.reload()  # the key is kept
    page.until("document.querySelector('#model').textContent === 'tiny'")
    assert not page.tab.query_selector("#ask-key[open]")
    page.context.close()
    server.stop()
