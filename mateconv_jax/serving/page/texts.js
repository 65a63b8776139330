// Every text of the page: [Chinese, English]. {0}, {1} are filled in.

export const TEXTS = {
  newChat: ["新对话", "New chat"],
  conversations: ["对话列表", "Conversations"],
  openList: ["打开对话列表", "Open conversations"],
  untitled: ["新对话", "New chat"],
  remove: ["删除", "Delete"],
  removed: ["已删除「{0}」", "Deleted “{0}”"],
  undo: ["撤销", "Undo"],
  settings: ["设置", "Settings"],
  close: ["关闭", "Close"],
  language: ["English", "中文"],
  themeAuto: ["主题：跟随系统", "Theme: system"],
  themeLight: ["主题：浅色", "Theme: light"],
  themeDark: ["主题：深色", "Theme: dark"],
  welcome: ["有什么想聊的？", "What is on your mind?"],
  welcomeHint: ["对话只保存在这个浏览器里。", "Conversations are kept in this browser only."],
  placeholder: ["输入消息……", "Write a message …"],
  send: ["发送", "Send"],
  stop: ["停止", "Stop"],
  hint: ["Enter 发送 · Shift+Enter 换行 · Esc 停止", "Enter sends · Shift+Enter new line · Esc stops"],
  toEnd: ["回到底部", "Go to the end"],
  you: ["你", "You"],
  copy: ["复制", "Copy"],
  copied: ["已复制", "Copied"],
  regenerate: ["重新生成", "Regenerate"],
  edit: ["修改", "Edit"],
  cancel: ["取消", "Cancel"],
  saveAndSend: ["发送修改", "Send"],
  editDrops: ["后面的 {0} 条消息会被删除。", "The {0} messages after it will be deleted."],
  thinking: ["思考过程", "Reasoning"],
  waiting: ["等待回答", "Waiting for the answer"],
  empty: ["（空回答）", "(empty answer)"],
  stopped: ["已停止", "Stopped"],
  cutOff: ["回答到了长度上限", "The answer reached the length limit"],
  lost: ["连接中断，已收到的部分已保留。", "Connection lost. What had arrived is kept."],
  noServer: ["连不上服务器。", "The server does not answer."],
  interrupted: ["页面关闭时回答还没有结束。", "The page was closed before the answer ended."],
  retry: ["重试", "Retry"],
  refused: ["服务器拒绝了请求：{0}", "The server refused: {0}"],
  busy: ["服务器正忙，请 {0} 秒后重试。", "The server is busy. Try again in {0} s."],
  tooLong: ["这个问题有 {0} 个 token，上下文只有 {1} 个。请缩短后再发。", "This question has {0} tokens, the context {1}. Shorten it and send it again."],
  leftOut: ["上下文已满：以上消息不再发送给模型", "Context full: the messages above are no longer sent to the model"],
  leftOutToast: ["上下文已满，最早的 {0} 条消息没有发送。", "The context is full: the oldest {0} messages were left out."],
  speed: ["{0} 个 token · {1} token/s", "{0} tokens · {1} tokens/s"],
  firstToken: ["首个 {0} s", "first after {0} s"],
  context: ["上下文 {0} / {1}", "Context {0} / {1}"],
  contextTitle: ["已用的上下文（token）", "Tokens of the context in use"],
  loading: ["模型加载中……", "The model is loading …"],
  unreachable: ["连不上服务器，正在重试……", "No connection to the server; trying again …"],
  full: ["浏览器的存储空间已满，新消息无法保存。请删除一些对话。", "The browser's storage is full: new messages are not kept. Delete some conversations."],
  system: ["系统提示词（本对话和以后的新对话）", "System prompt (of this and new conversations)"],
  systemPlaceholder: ["例如：你是一个简洁的助手。", "For example: You answer briefly."],
  preset: ["预设", "Preset"],
  presetServer: ["服务器默认", "Server's defaults"],
  presetCreative: ["创意", "Creative"],
  presetChat: ["聊天", "Chat"],
  presetFactual: ["准确", "Factual"],
  presetOwn: ["自定义", "Custom"],
  temperature: ["温度", "Temperature"],
  topP: ["Top-p", "Top-p"],
  topK: ["Top-k（0 为不限）", "Top-k (0: all)"],
  minP: ["Min-p", "Min-p"],
  repetitionPenalty: ["重复惩罚", "Repetition penalty"],
  presencePenalty: ["存在惩罚", "Presence penalty"],
  frequencyPenalty: ["频率惩罚", "Frequency penalty"],
  maxTokens: ["最多 token 数", "Most tokens"],
  seed: ["随机种子", "Seed"],
  samplingHint: ["留空则由服务器决定；种子留空则每次随机。", "Empty: the server decides. An empty seed is drawn anew each time."],
  invalid: ["请输入 {0} 到 {1} 之间的数。", "Expected a number from {0} to {1}."],
  key: ["API 密钥", "API key"],
  keyNeeded: ["这个服务器需要 API 密钥。", "This server needs an API key."],
  keyWrong: ["密钥不对，请重新输入。", "That key is not valid. Try again."],
  keyHint: ["只保存在这个浏览器里。", "Kept in this browser only."],
  save: ["保存", "Save"],
  shortcuts: ["快捷键：/ 聚焦输入框，空输入框里按 ↑ 修改上一个问题，Esc 停止。", "Keys: / goes to the input, ↑ in an empty input edits the last question, Esc stops."],
};

let column = 0;

export function setLanguage(language) {
  column = language === "en" ? 1 : 0;
  document.documentElement.lang = column ? "en" : "zh-CN";
}

/** The text of this name in the language chosen. */
export function t(name, ...values) {
  return TEXTS[name][column].replace(/\{(\d)\}/g, (_, i) => values[i]);
}

/** Fill in what the HTML names: data-text, data-label (aria-label and tooltip), data-placeholder. */
export function translate(root) {
  for (const node of root.querySelectorAll("[data-text]")) node.textContent = t(node.dataset.text);
  for (const node of root.querySelectorAll("[data-placeholder]")) node.placeholder = t(node.dataset.placeholder);
  for (const node of root.querySelectorAll("[data-label]")) {
    node.title = t(node.dataset.label);
    node.setAttribute("aria-label", node.title);
  }
}
