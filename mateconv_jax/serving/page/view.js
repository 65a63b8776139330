// A message as DOM. Nothing here knows the server or the store; buttons carry data-action, which app.js handles.

import { render } from "./markdown.js";
import { t } from "./texts.js";

const LONGEST_PAUSE = 1000; // ms between two renderings of a long answer

export function element(tag, options = {}, ...children) {
  const { dataset, ...properties } = options;
  const node = Object.assign(document.createElement(tag), properties);
  Object.assign(node.dataset, dataset);
  node.append(...children);
  return node;
}

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

export function iconButton(name, label, action) {
  const button = element("button", { className: "icon", type: "button", title: t(label), dataset: { action } }, icon(name));
  button.setAttribute("aria-label", t(label));
  return button;
}

/** A whole message. `index` is its place in the conversation. */
export function messageElement(message, index, isRunning) {
  if (message.role === "user") return questionElement(message, index);
  const node = element("article", { className: "answer", dataset: { index } });
  fillAnswer(node, message, isRunning);
  return node;
}

function questionElement(message, index) {
  const buttons = element("div", { className: "buttons" }, iconButton("copy", "copy", "copy"), iconButton("edit", "edit", "edit"));
  const text = element("div", { className: "text", textContent: message.content });
  const node = element("article", { className: "question", dataset: { index } }, text, buttons);
  node.setAttribute("aria-label", t("you"));
  return node;
}

/** The question as a form; `nAfter` messages go if it is sent again. */
export function questionEditor(content, nAfter) {
  const area = element("textarea", { value: content });
  area.setAttribute("aria-label", t("edit"));
  const buttons = element(
    "div",
    { className: "row" },
    element("span", { className: "quiet", textContent: nAfter ? t("editDrops", nAfter) : "" }),
    element("button", { type: "button", textContent: t("cancel"), dataset: { action: "cancel-edit" } }),
    element("button", { type: "button", className: "primary", textContent: t("saveAndSend"), dataset: { action: "save-edit" } }),
  );
  return element("div", { className: "editor" }, area, buttons);
}

function fillAnswer(node, message, isRunning) {
  node.replaceChildren();
  node.setAttribute("aria-busy", isRunning);
  if (message.reasoning) node.append(reasoningElement(message, isRunning));
  const text = element("div", { className: "text markdown" });
  if (message.content) {
    text.append(render(message.content));
    addCopyButtons(text);
  } else if (isRunning) {
    const dots = element("span", { className: "waiting" }, element("i"), element("i"), element("i"));
    dots.setAttribute("aria-label", t("waiting"));
    if (!message.reasoning) text.append(dots);
  } else if (!message.problem && message.ended !== "interrupted") {
    text.append(element("span", { className: "quiet", textContent: t("empty") }));
  }
  node.append(text);
  // What a reload finds half finished was being written when its page closed.
  const problem = !isRunning && message.ended === "interrupted" ? { text: "interrupted", values: [] } : message.problem;
  if (problem) node.append(problemElement(problem));
  node.append(element("div", { className: "row" }, statsElement(message), buttonsOf(message, isRunning)));
}

function reasoningElement(message, isRunning) {
  const text = element("div", { className: "text", textContent: message.reasoning });
  const summary = element("summary", { textContent: t("thinking") });
  return element("details", { open: isRunning && !message.content }, summary, text);
}

function addCopyButtons(text) {
  for (const pre of text.querySelectorAll("pre")) pre.append(iconButton("copy", "copy", "copy-code"));
  for (const table of text.querySelectorAll("table")) {
    const frame = element("div", { className: "wide-table" });
    table.replaceWith(frame);
    frame.append(table);
  }
}

function problemElement(problem) {
  const retry = element("button", { type: "button", textContent: t("retry"), dataset: { action: "retry" } });
  const node = element("div", { className: "problem" }, element("span", { textContent: t(problem.text, ...problem.values) }), retry);
  node.setAttribute("role", "alert");
  return node;
}

function buttonsOf(message, isRunning) {
  const buttons = element("div", { className: "buttons" });
  if (!isRunning) buttons.append(iconButton("copy", "copy", "copy"), iconButton("again", "regenerate", "regenerate"));
  return buttons;
}

/** `7 tokens · 45 tokens/s · first after 0.12 s · Stopped` */
function statsElement(message) {
  const { stats, ended } = message;
  const parts = [];
  if (stats?.tokens) {
    const about = stats.exact ? "" : "≈ ";
    const speed = stats.tokens / Math.max(stats.seconds, 1e-3);
    parts.push(about + t("speed", stats.tokens, speed < 10 ? speed.toFixed(1) : Math.round(speed)));
    parts.push(t("firstToken", stats.first.toFixed(2)));
  }
  if (ended && ended !== "interrupted") parts.push(t(ended));
  return element("span", { className: "stats", textContent: parts.join(" · ") });
}

/** The line between what the model still reads and what it does not. */
export function leftOutElement() {
  return element("div", { className: "left-out", textContent: t("leftOut") });
}

/** Shows an answer while it grows: at once when it can, less often when rendering it takes long. */
export class GrowingAnswer {
  constructor(node, message, afterwards) {
    Object.assign(this, { node, message, afterwards, timer: null, pause: 0 });
  }

  update() {
    this.timer ??= setTimeout(() => {
      this.timer = null;
      const begin = performance.now();
      fillAnswer(this.node, this.message, true);
      this.afterwards();
      this.pause = Math.min(LONGEST_PAUSE, 4 * (performance.now() - begin));
    }, this.pause);
  }

  end() {
    clearTimeout(this.timer);
  }
}
