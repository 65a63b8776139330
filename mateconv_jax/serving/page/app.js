// The page: what is shown, what the buttons do, and how an answer arrives.

import * as api from "./api.js";
import { answered, firstThatFits, nextTurn, ratioOfAnswer, ratioOfPrompt } from "./context.js";
import { SAMPLING, setUpSettings } from "./settings.js";
import * as store from "./store.js";
import { setLanguage, t, translate } from "./texts.js";
import { element, GrowingAnswer, iconButton, leftOutElement, messageElement, questionEditor } from "./view.js";

const $ = (id) => document.getElementById(id);
const settings = store.loadSettings();
const server = { context: null, presets: {}, model: null };
const running = new Map(); // conversation id → {controller, conversation, message, growing}
let key = store.loadKey();
let conversation = store.newConversation(settings.system);
let leaving = false; // the browser closes the page, and its connections with it
let isWatching = false; // the server, until it is ready
let toastTimer = null;
const hasKeyboard = matchMedia("(hover: hover)").matches; // on a phone Enter is a new line: there is no Shift+Enter
let sticks = true; // the view follows the answer, until the reader scrolls up

// ---- showing -----------------------------------------------------------------------------------------------------------

function show() {
  const run = running.get(conversation.id);
  const { messages } = conversation;
  const nodes = messages.map((message, i) => messageElement(message, i, run?.message === message));
  const cut = messages.findLast((message) => message.role === "assistant")?.leftOut;
  if (cut) nodes.splice(cut, 0, leftOutElement());
  $("messages").replaceChildren(...(nodes.length ? nodes : [welcome()]));
  if (run) run.growing = growing(run);
  $("stop").hidden = !run;
  $("send").hidden = Boolean(run);
  const name = server.model ?? "mateconv_jax";
  document.title = messages.length ? `${titleOf(conversation)} · ${name}` : name;
  showContext();
  showList();
  follow();
}

function growing(run) {
  return new GrowingAnswer($("messages").querySelector(".answer:last-of-type"), run.message, follow);
}

function welcome() {
  const hint = element("p", { className: "quiet", textContent: t("welcomeHint") });
  return element("div", { className: "welcome" }, element("h2", { textContent: t("welcome") }), hint);
}

function follow() {
  const scroll = $("scroll");
  if (sticks) scroll.scrollTop = scroll.scrollHeight;
  $("to-end").hidden = sticks;
}

function titleOf(one) {
  const first = one.messages.find((message) => message.role === "user")?.content.trim().replace(/\s+/g, " ");
  if (!first) return t("untitled");
  return first.length > 40 ? `${first.slice(0, 40)}…` : first;
}

function showList() {
  const items = store.listConversations().map((one) => {
    const open = element("button", { className: "open", textContent: titleOf(one), title: titleOf(one), dataset: { action: "open" } });
    if (one.id === conversation.id) open.setAttribute("aria-current", "true");
    return element("div", { className: "item", dataset: { id: one.id } }, open, iconButton("bin", "remove", "remove"));
  });
  $("list").replaceChildren(...items);
}

function showContext() {
  const total = conversation.messages.findLast((message) => message.stats?.total)?.stats.total;
  $("context").hidden = !(total && server.context);
  if ($("context").hidden) return;
  $("meter").value = total / server.context;
  $("context").lastElementChild.textContent = t("context", total, server.context);
}

function toast(text, action = null, act = null) {
  const [span, button] = $("toast").children;
  span.textContent = text;
  button.hidden = !action;
  button.textContent = action ?? "";
  button.onclick = () => {
    $("toast").hidden = true;
    act();
  };
  $("toast").hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => ($("toast").hidden = true), action ? 8000 : 3000);
}

function keep(one) {
  one.updated = Date.now();
  if (!store.saveConversation(one)) toast(t("full"));
}

// ---- an answer ---------------------------------------------------------------------------------------------------------

/** Ask for an answer to the conversation's last question. `before`: the answer that broke off, to be continued. */
async function answer(before = null) {
  const one = conversation;
  if (running.has(one.id)) return;
  const seed = before?.seed ?? settings.sampling.seed ?? crypto.getRandomValues(new Uint32Array(1))[0];
  const message = { role: "assistant", content: before?.content ?? "", reasoning: before?.reasoning ?? "", seed, ended: "interrupted" };
  const run = { controller: new AbortController(), conversation: one, message };
  one.messages.push(message);
  running.set(one.id, run);
  sticks = true;
  keep(one);
  show();
  try {
    await receive(one, run);
  } catch (error) {
    if (!leaving) explain(error, message);
  } finally {
    running.delete(one.id);
    run.growing?.end();
    if (!run.isRemoved) keep(one);
    if (one === conversation) show();
    else showList();
  }
}

/** Sends the question, leaving out the oldest turns until it fits, and puts what arrives into run.message. */
async function receive(one, run) {
  const items = answered(one.messages.slice(0, -1));
  const limit = settings.sampling.max_tokens;
  let start = firstThatFits(items, one.system, server.context ?? Infinity, limit, settings.tokensPerCharacter);
  for (;;) {
    const sent = [...(one.system ? [{ role: "system", content: one.system }] : []), ...items.slice(start)];
    noteLeftOut(one, run.message, items, start);
    try {
      return await stream(one, run, sent.map(({ role, content }) => ({ role, content })));
    } catch (error) {
      if (error.code !== "context_length_exceeded") throw error;
      learn(ratioOfPrompt(sent, Number(error.message.match(/\d+/)?.[0])));
      const next = nextTurn(items, start);
      if (next === null) throw error;
      start = Math.max(next, firstThatFits(items, one.system, server.context ?? Infinity, limit, settings.tokensPerCharacter));
    }
  }
}

/** Where the line is drawn above which the model reads nothing; said aloud the first time. */
function noteLeftOut(one, message, items, start) {
  message.leftOut = start ? items[start].index : 0;
  const isFirst = !one.messages.some((other) => other !== message && other.leftOut);
  if (message.leftOut && isFirst) toast(t("leftOutToast", message.leftOut));
}

function learn(ratio) {
  if (!ratio) return;
  settings.tokensPerCharacter = ratio;
  store.saveSettings(settings);
}

async function stream(one, run, messages) {
  const { message } = run;
  const begin = performance.now();
  const since = () => (performance.now() - begin) / 1000;
  const before = { content: message.content, reasoning: message.reasoning };
  const received = { content: "", reasoning: "" };
  let saved = begin;
  const sampling = Object.fromEntries(Object.keys(SAMPLING).map((name) => [name, settings.sampling[name] ?? undefined]));
  const body = { ...sampling, model: await model(), messages, seed: message.seed };
  for await (const { choices, usage } of api.streamChat(body, key, run.controller.signal)) {
    const delta = choices[0]?.delta ?? {};
    received.content += delta.content ?? "";
    received.reasoning += delta.reasoning_content ?? "";
    // The same seed gives the same text: after a lost connection the rest follows what is there already.
    for (const part of ["content", "reasoning"]) {
      if (!before[part].startsWith(received[part])) message[part] = received[part];
    }
    if (received.content || received.reasoning) {
      message.stats ??= { first: since() };
      const tokens = Math.round((received.content + received.reasoning).length * settings.tokensPerCharacter);
      Object.assign(message.stats, { tokens, exact: false, seconds: since() });
    }
    if (choices[0]?.finish_reason) message.ended = choices[0].finish_reason === "length" ? "cutOff" : null;
    if (usage) finish(message, messages, usage, since());
    if (one === conversation) run.growing?.update();
    if (performance.now() - saved > 1000) {
      keep(one);
      saved = performance.now();
    }
  }
  Object.assign(message, received);
}

function finish(message, sent, usage, seconds) {
  const first = message.stats?.first ?? seconds;
  message.stats = { tokens: usage.completion_tokens, exact: true, seconds, first, total: usage.total_tokens };
  learn(ratioOfAnswer(message.content + message.reasoning, usage.completion_tokens) ?? ratioOfPrompt(sent, usage.prompt_tokens));
}

/** The server's model; asked for once. */
async function model() {
  server.model ??= await api.modelName(key);
  $("model").textContent = server.model;
  return server.model;
}

/** Turns what went wrong into the message's problem, which has a button to try again. */
function explain(error, message) {
  message.ended = null;
  const hasText = message.content || message.reasoning;
  if (error.name === "AbortError") {
    message.ended = "stopped";
  } else if (error instanceof api.ConnectionLost) {
    message.problem = { text: hasText ? "lost" : "noServer", values: [] };
    watch();
  } else if (error.code === "invalid_api_key") {
    message.problem = { text: "keyNeeded", values: [] };
    askKey(key ? "keyWrong" : "keyNeeded");
  } else if (error.code === "context_length_exceeded") {
    message.problem = { text: "tooLong", values: error.message.match(/\d+/g).slice(0, 2) };
  } else if (error.code === "model_not_found") {
    server.model = null; // another server came up in its place
    message.problem = { text: "refused", values: [error.message] };
  } else if (error.retryAfter) {
    message.problem = { text: "busy", values: [error.retryAfter] };
    if (error.code === "not_ready") watch();
  } else {
    message.problem = { text: "refused", values: [error.message] };
  }
  if (!(error instanceof api.ApiError || error instanceof api.ConnectionLost || error.name === "AbortError")) console.error(error);
}

// ---- the server's state ------------------------------------------------------------------------------------------------

/** Says above the dialogue that the server is away or loading, and looks again until it is ready. */
async function watch() {
  if (isWatching) return;
  isWatching = true;
  for (;;) {
    const status = await api.health();
    $("banner").hidden = status === "ready";
    if (status === "ready") break;
    $("banner").textContent = t(status === null ? "unreachable" : "loading");
    await new Promise((resolve) => setTimeout(resolve, 1500));
  }
  isWatching = false;
  try {
    Object.assign(server, await api.pageSettings());
    fillSettings();
    if (server.needs_key && !key) askKey("keyNeeded");
    else await model();
  } catch (error) {
    if (error.code === "invalid_api_key") askKey("keyWrong");
  }
  showContext();
}

function askKey(why) {
  $("key-why").textContent = t(why);
  $("key").value = key;
  if (!$("ask-key").open) $("ask-key").showModal();
}

$("close-key").onclick = () => $("ask-key").close();
$("ask-key").querySelector("form").onsubmit = () => {
  key = $("key").value.trim();
  store.saveKey(key);
  const last = conversation.messages.at(-1);
  if (last?.problem?.text === "keyNeeded") actions.retry(conversation.messages.length - 1);
  else watch();
};

// ---- what the buttons do -----------------------------------------------------------------------------------------------

function send() {
  const content = $("input").value.trim();
  if (!content || running.has(conversation.id)) return;
  $("input").value = "";
  grow();
  conversation.messages.push({ role: "user", content });
  answer();
}

function open(id) {
  conversation = store.loadConversation(id) ?? store.newConversation(settings.system);
  const run = running.get(id);
  if (run) conversation = run.conversation;
  sticks = true;
  closeEditor();
  fillSettings();
  show();
  document.body.classList.remove("list-open");
}

function startNew() {
  conversation = store.newConversation(settings.system);
  fillSettings();
  show();
  document.body.classList.remove("list-open");
  if (hasKeyboard) $("input").focus();
}

function remove(id) {
  const run = running.get(id);
  const wasShown = id === conversation.id;
  const removed = run?.conversation ?? (wasShown ? conversation : store.loadConversation(id));
  if (run) {
    run.isRemoved = true;
    run.controller.abort();
  }
  store.deleteConversation(id);
  if (wasShown) startNew();
  else showList();
  toast(t("removed", titleOf(removed)), t("undo"), () => {
    store.saveConversation(removed);
    if (wasShown) open(id);
    else showList();
  });
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Browsers have no clipboard for pages over plain HTTP from another machine.
    const area = element("textarea", { value: text, className: "off-screen" });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  toast(t("copied"));
}

function closeEditor() {
  document.querySelector(".editor")?.remove();
  document.querySelector(".question.edited")?.classList.remove("edited");
}

const actions = {
  copy: (index) => copy(conversation.messages[index].content),
  "copy-code": (_, button) => copy(button.closest("pre").querySelector("code").textContent.replace(/\n$/, "")),
  regenerate(index) {
    conversation.messages.splice(index);
    answer();
  },
  retry(index) {
    const [before] = conversation.messages.splice(index);
    answer(before);
  },
  edit(index, button) {
    closeEditor();
    const node = button.closest(".question");
    const editor = questionEditor(conversation.messages[index].content, conversation.messages.length - index - 1);
    node.classList.add("edited");
    node.append(editor);
    editor.querySelector("textarea").focus();
  },
  "cancel-edit": closeEditor,
  "save-edit"(index, button) {
    const content = button.closest(".editor").querySelector("textarea").value.trim();
    if (!content) return;
    conversation.messages.splice(index, Infinity, { role: "user", content });
    answer();
  },
};

$("messages").addEventListener("click", (event) => {
  const button = event.target.closest("[data-action]");
  if (!button) return;
  const changes = !["copy", "copy-code", "cancel-edit"].includes(button.dataset.action);
  if (changes && running.has(conversation.id)) return;
  actions[button.dataset.action](Number(button.closest("article").dataset.index), button);
});

$("list").addEventListener("click", (event) => {
  const button = event.target.closest("[data-action]");
  if (!button) return;
  const { id } = button.closest(".item").dataset;
  if (button.dataset.action === "open") open(id);
  else remove(id);
});

$("composer").onsubmit = (event) => {
  event.preventDefault();
  send();
};
$("stop").onclick = () => running.get(conversation.id)?.controller.abort();
$("new").onclick = $("new-small").onclick = startNew;
$("menu").onclick = () => document.body.classList.toggle("list-open");
$("shade").onclick = () => document.body.classList.remove("list-open");
$("to-end").onclick = () => {
  sticks = true;
  follow();
};
$("scroll").onscroll = () => {
  const { scrollTop, scrollHeight, clientHeight } = $("scroll");
  sticks = scrollHeight - scrollTop - clientHeight < 40;
  $("to-end").hidden = sticks;
};

// ---- keyboard ----------------------------------------------------------------------------------------------------------

function grow() {
  $("input").style.height = "auto";
  $("input").style.height = `${$("input").scrollHeight}px`;
}
$("input").oninput = grow;

document.addEventListener("keydown", (event) => {
  // Enter that chooses a word in an input method belongs to it. Safari has ended the composition by then: 229 tells.
  if (event.isComposing || event.keyCode === 229) return;
  const inEditor = event.target.closest?.(".editor");
  const isWriting = event.target === $("input") || (inEditor && event.target.matches("textarea"));
  if (event.key === "Enter" && !event.shiftKey && hasKeyboard && isWriting) {
    event.preventDefault();
    if (inEditor) inEditor.querySelector("[data-action=save-edit]").click();
    else send();
  } else if (event.key === "Escape" && !document.querySelector("dialog[open]")) {
    if (inEditor) closeEditor();
    else if (document.body.classList.contains("list-open")) document.body.classList.remove("list-open");
    else $("stop").click();
  } else if (event.key === "ArrowUp" && event.target === $("input") && !$("input").value) {
    event.preventDefault();
    [...document.querySelectorAll("[data-action=edit]")].at(-1)?.click();
  } else if (event.key === "/" && !event.target.matches("input, textarea, select") && !document.querySelector("dialog[open]")) {
    event.preventDefault();
    $("input").focus();
  }
});

// ---- language, theme, settings -----------------------------------------------------------------------------------------

function speak() {
  setLanguage(settings.language);
  translate(document);
  $("theme").lastElementChild.textContent = t({ auto: "themeAuto", light: "themeLight", dark: "themeDark" }[settings.theme]);
  fillSettings();
  show();
}

$("language").onclick = () => {
  settings.language = settings.language === "zh" ? "en" : "zh";
  store.saveSettings(settings);
  speak();
};

$("theme").onclick = () => {
  settings.theme = { auto: "light", light: "dark", dark: "auto" }[settings.theme];
  store.saveSettings(settings);
  if (settings.theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = settings.theme;
  speak();
};

const fillSettings = setUpSettings({
  settings,
  presets: () => server.presets,
  conversation: () => conversation,
  changed() {
    store.saveSettings(settings);
    if (conversation.messages.length) keep(conversation);
  },
});

// ---- start -------------------------------------------------------------------------------------------------------------

window.addEventListener("storage", (event) => {
  if (!store.isConversation(event.key)) return;
  if (event.key?.endsWith(conversation.id) && !running.has(conversation.id)) open(conversation.id);
  else showList();
});
window.addEventListener("pagehide", () => {
  leaving = true;
  running.forEach((run) => keep(run.conversation));
});
window.addEventListener("pageshow", () => (leaving = false));

conversation = store.listConversations()[0] ?? conversation;
speak();
watch();
if (hasKeyboard) $("input").focus();
