// Markdown to DOM. What the model writes is untrusted: everything goes through DOMPurify, which lets these tags through and no image
// (its address could carry the dialogue elsewhere), and the page's Content-Security-Policy stands behind it.

import "./vendor/purify.min.js";
import hljs from "./vendor/highlight.min.js";
import { Marked } from "./vendor/marked.esm.js";

const LONGEST_MARKDOWN = 100_000; // characters; longer texts, and longer code, are shown as they are
const LONGEST_CODE = 20_000;
const TAGS = (
  "a b blockquote br code del em h1 h2 h3 h4 h5 h6 hr i input li ol p pre s span strong sub sup table tbody td th thead tr ul"
).split(" ");
const SANITIZE = {
  ALLOWED_TAGS: TAGS,
  ALLOWED_ATTR: ["href", "class", "start", "align", "type", "checked", "disabled"],
  ALLOWED_URI_REGEXP: /^(https?|mailto):/i,
  RETURN_DOM_FRAGMENT: true,
};

const escape = (text) => text.replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);

const marked = new Marked({
  gfm: true,
  breaks: true, // small models end their lines with one newline
  renderer: {
    code({ text, lang }) {
      const language = hljs.getLanguage(lang ?? "") ? lang : null;
      const html = language && text.length <= LONGEST_CODE ? hljs.highlight(text, { language }).value : escape(text);
      return `<pre><code class="hljs${language ? ` language-${escape(language)}` : ""}">${html}\n</code></pre>`;
    },
    html: ({ text }) => escape(text), // tags are shown, as they are nearly always code
    image: ({ href, text }) => `<a href="${escape(href)}">${escape(text || href)}</a>`,
  },
});

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName === "A") {
    node.setAttribute("target", "_blank");
    node.setAttribute("rel", "noopener noreferrer");
  }
  if (node.tagName === "INPUT") {
    if (node.getAttribute("type") !== "checkbox") node.remove();
    node.setAttribute("disabled", "");
  }
});

/** A fragment or, where the text is too long or too deeply nested for Markdown, a text node. */
export function render(text) {
  if (text.length > LONGEST_MARKDOWN) return document.createTextNode(text);
  try {
    return DOMPurify.sanitize(marked.parse(text), SANITIZE);
  } catch {
    return document.createTextNode(text);
  }
}
