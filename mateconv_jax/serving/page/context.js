// Which turns of a dialogue fit into the context. The page cannot tokenise: it estimates, learns from every answer's usage how many
// tokens a character has, and drops more when the server refuses a prompt.

const TOKENS_PER_MESSAGE = 6; // role and control tokens of the usual templates
const ANSWER_SHARE = 0.25; // of the context, kept free for the answer unless max_tokens is smaller
const FEWEST_CHARACTERS = 20; // to learn from

const characters = (messages) => messages.reduce((sum, message) => sum + message.content.length, 0);

export function estimateTokens(messages, tokensPerCharacter) {
  return Math.ceil(characters(messages) * tokensPerCharacter + messages.length * TOKENS_PER_MESSAGE);
}

/** Tokens per character, given how many tokens the server counted in these messages; null of too little text. */
export function ratioOfPrompt(messages, nTokens) {
  const n = characters(messages);
  return n < FEWEST_CHARACTERS ? null : Math.max(0.1, (nTokens - messages.length * TOKENS_PER_MESSAGE) / n);
}

/** The same of an answer, which no template surrounds. */
export function ratioOfAnswer(text, nTokens) {
  return text.length < FEWEST_CHARACTERS ? null : nTokens / text.length;
}

/** The messages without questions that got no answer at all, but for the last. Items: {role, content, index}. */
export function answered(messages) {
  const items = messages.map(({ role, content }, index) => ({ role, content, index }));
  const isEmpty = (item) => item?.role === "assistant" && !item.content;
  return items.filter((item, i) => !isEmpty(item) && !isEmpty(items[i + 1]));
}

/** Start of the next turn after `start`; null when the turn at `start` is the last. */
export function nextTurn(items, start) {
  const next = items.findIndex((item, i) => i > start && item.role === "user");
  return next < 0 ? null : next;
}

/** Where the longest ending of whole turns begins that leaves room for an answer; the last turn always fits. */
export function firstThatFits(items, system, context, maxTokens, tokensPerCharacter) {
  const room = context - Math.min(maxTokens ?? Infinity, Math.floor(context * ANSWER_SHARE));
  const before = system ? [{ content: system }] : [];
  let start = 0;
  while (estimateTokens([...before, ...items.slice(start)], tokensPerCharacter) > room) {
    const next = nextTurn(items, start);
    if (next === null) break;
    start = next;
  }
  return start;
}
