// The server's API: one function for each thing the page asks. URLs are relative, so the page works behind a proxy's path.

/** The server's refusal, or an error inside a stream. `code` is OpenAI's; `retryAfter` is in seconds, or null. */
export class ApiError extends Error {
  constructor(status, error, retryAfter = null) {
    super(error?.message ?? `HTTP ${status}`);
    Object.assign(this, { status, code: error?.code ?? null, retryAfter });
  }
}

/** Nobody answers, or the answer broke off. */
export class ConnectionLost extends Error {}

function headers(key) {
  return key ? { authorization: `Bearer ${key}` } : {};
}

/** fetch() that throws ConnectionLost without a server, ApiError on a refusal, and AbortError when `signal` says so. */
async function request(url, options = {}) {
  let response;
  try {
    response = await fetch(url, { cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ConnectionLost(error.message);
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  throw new ApiError(response.status, body.error, Number(response.headers.get("retry-after")) || null);
}

/** {context, presets, needs_key} */
export async function pageSettings() {
  return (await request("page/settings.json")).json();
}

/** "ready", why the server takes no requests, or null when nobody answers. */
export async function health() {
  try {
    return (await (await fetch("health", { cache: "no-store" })).json()).status;
  } catch {
    return null;
  }
}

/** The served model's name. */
export async function modelName(key) {
  return (await (await request("v1/models", { headers: headers(key) })).json()).data[0].id;
}

/** The stream's objects, until [DONE]. A stream that ends without it was cut off: ConnectionLost. */
export async function* streamChat(body, key, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json", ...headers(key) },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    let piece;
    try {
      piece = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ConnectionLost(error.message);
    }
    if (piece.done) throw new ConnectionLost("the stream ended early");
    const events = (held + piece.value).split("\n\n");
    held = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const value = JSON.parse(data);
      if (value.error) throw new ApiError(response.status, value.error);
      yield value;
    }
  }
}
