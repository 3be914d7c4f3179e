// The API, as any client asks it. Owns the Bearer key; knows no element of the page.

const KEY = "trimkv-key";

/** The key a person has entered, kept in this tab and nowhere else; `onDenied` is called when one is missing or wrong. */
export const access = {
  key: sessionStorage.getItem(KEY) ?? "",
  onDenied: () => {},
  enter(key) {
    this.key = key.trim();
    sessionStorage.setItem(KEY, this.key);
  },
};

export class ApiError extends Error {
  constructor(status, message, retryAfter = 0) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }

  get isDenied() {
    return this.status === 401 || this.status === 403;
  }
}

/** An answer of the API, or an ApiError in the server's own words. Paths are relative: a proxy may add a prefix. */
export async function call(path, { body, signal } = {}) {
  const headers = {};
  if (access.key) headers.Authorization = `Bearer ${access.key}`;
  if (body) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  if (answer.ok) return answer;
  const text = await answer.text();
  let message = text.slice(0, 300) || answer.statusText;
  try {
    message = JSON.parse(text).error.message;
  } catch { /* not the API's envelope: a proxy's own page */ }
  const error = new ApiError(answer.status, message, Number(answer.headers.get("Retry-After")) || 0);
  if (error.isDenied) access.onDenied();
  throw error;
}

export const getJson = async (path, options) => (await call(path, options)).json();

/** The data of server-sent events, parsed, up to [DONE]; a stream that ends without it was cut on the way. */
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the answer ended early");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}
