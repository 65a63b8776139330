// What the browser keeps. Each conversation has a key of its own, so that two tabs do not overwrite each other's.
//
// A conversation: {id, updated, system, messages}. A message: {role, content} and, for an answer, {reasoning, seed, problem, ended,
// leftOut, stats: {tokens, exact, seconds, first, total}}.

const SETTINGS = "mateconv.settings";
const KEY = "mateconv.key";
const CONVERSATION = "mateconv.conversation.";
const DEFAULTS = { language: "zh", theme: "auto", system: "", tokensPerCharacter: 1, sampling: {} };

function read(name) {
  try {
    return JSON.parse(localStorage.getItem(name));
  } catch {
    return null;
  }
}

/** Whether there was room. */
function write(name, value) {
  try {
    localStorage.setItem(name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

export const loadSettings = () => ({ ...DEFAULTS, ...read(SETTINGS) });
export const saveSettings = (settings) => write(SETTINGS, settings);
export const loadKey = () => read(KEY) ?? "";
export const saveKey = (key) => write(KEY, key);

export function newConversation(system) {
  const id = [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  return { id, updated: Date.now(), system, messages: [] };
}

export function loadConversation(id) {
  const found = read(CONVERSATION + id);
  return Array.isArray(found?.messages) ? found : null;
}

export const saveConversation = (conversation) => write(CONVERSATION + conversation.id, conversation);
export const deleteConversation = (id) => localStorage.removeItem(CONVERSATION + id);
export const isConversation = (name) => name === null || name.startsWith(CONVERSATION);

/** All of them, the newest first. */
export function listConversations() {
  let names = [];
  try {
    names = Object.keys(localStorage).filter((name) => name.startsWith(CONVERSATION));
  } catch {
    // Storage is switched off: nothing is kept.
  }
  const found = names.map((name) => loadConversation(name.slice(CONVERSATION.length))).filter(Boolean);
  return found.sort((a, b) => b.updated - a.updated);
}
