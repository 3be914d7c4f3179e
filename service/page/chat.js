// The left side: a conversation. Owns its history and the answer that is being made.

import { $, bytes, element, number, share } from "./basics.js";
import { ApiError, call, events, getJson } from "./server.js";
import { TextFlow, isAtEnd, toEnd } from "./text-flow.js";

export class Chat {
  /**
   * `cache` shows what the running answer keeps; `fields()` are the request's besides its messages; `systemPrompt()` may
   * be empty; `onChange` is called when an answer begins or ends.
   */
  constructor(cache, { fields, systemPrompt, onChange }) {
    Object.assign(this, { cache, fields, systemPrompt, onChange });
    this.log = $("log");
    this.history = [];
    /** What stops the running answer, and the one begun last; null while there is none. */
    this.running = this.latest = null;
  }

  stop() {
    this.running?.abort();
  }

  restart() {
    this.stop();
    this.running = this.latest = null;
    this.history = [];
    for (const article of this.log.querySelectorAll("article")) article.remove();
    $("welcome").hidden = false;
    this.cache.heatView.pick(null);
    this.cache.clear();
    this.onChange();
  }

  async send(text) {
    if (this.running || !text.trim()) return;
    const history = this.history; // a new chat begins another
    history.push({ role: "user", content: text });
    this.addQuestion(text);
    const article = this.addArticle("assistant busy", "Answer");
    article.setAttribute("aria-busy", "true");
    toEnd(this.log);
    const mine = this.running = this.latest = new AbortController();
    this.onChange();
    const answer = new Answer(article.firstChild, this.log);
    try {
      await this.stream(answer, mine);
    } catch (error) {
      if (error.name === "AbortError") answer.reason = "stopped";
      else addError(article, error instanceof ApiError ? error.message : `The connection broke: ${error.message}`);
    }
    answer.flow.end();
    article.classList.remove("busy");
    article.removeAttribute("aria-busy");
    history.push({ role: "assistant", content: answer.text });
    if (!answer.text) history.splice(-2);
    if (this.running === mine) await this.cache.end();
    const wasAtEnd = isAtEnd(this.log), note = answer.note();
    if (note.length) article.append(element("div", "note", ...note));
    if (wasAtEnd) toEnd(this.log);
    if (this.running !== mine) return;
    this.running = null;
    this.onChange();
  }

  async stream(answer, mine) {
    const system = this.systemPrompt();
    const messages = [...(system ? [{ role: "system", content: system }] : []), ...this.history];
    const body = {
      ...this.fields(), messages, stream: true, stream_options: { include_usage: true, continuous_usage_stats: true },
    };
    this.cache.clear();
    this.showPrompt(body.model, messages, mine);
    const response = await call("v1/chat/completions", { body, signal: mine.signal });
    // Known before the first token, so that reading the prompt can be watched too.
    this.cache.watch(response.headers.get("X-Trimkv-Id"));
    for await (const chunk of events(response)) {
      if (chunk.error) throw new ApiError(500, chunk.error.message);
      const choice = chunk.choices[0];
      answer.usage = chunk.usage?.kv ? chunk.usage : answer.usage;
      answer.reason = choice?.finish_reason ?? answer.reason;
      if (choice?.delta.content === undefined || choice.delta.role) continue;
      answer.take(choice.delta.content, chunk.usage?.completion_tokens ?? answer.tokens + 1, this.cache.tokenView);
    }
  }

  /** The prompt's tokens, as the server cuts them. Without that endpoint, or the right to it, they stay without text. */
  async showPrompt(model, messages, mine) {
    try {
      const { token_strs: texts } = await getJson("tokenize", { body: { model, messages, return_token_strs: true } });
      if (texts && this.latest === mine) this.cache.tokenView.setPrompt(texts);
    } catch { /* shown as dots */ }
  }

  addArticle(kind, label) {
    $("welcome").hidden = true;
    const article = element("article", kind, element("div", "body"));
    article.setAttribute("aria-label", label);
    this.log.append(article);
    return article;
  }

  /** A long one is folded: what matters is the answer. */
  addQuestion(text) {
    const article = this.addArticle("user", "You"), body = article.firstChild;
    body.append(element("p", "", text));
    if (body.scrollHeight <= body.clientHeight + 4) return;
    const more = element("button", "more", "Show all");
    more.type = "button";
    more.setAttribute("aria-expanded", "false");
    more.addEventListener("click", () => {
      const isOpen = article.classList.toggle("open");
      more.textContent = isOpen ? "Show less" : "Show all";
      more.setAttribute("aria-expanded", String(isOpen));
    });
    article.classList.add("long");
    article.append(more);
  }
}

/** One answer on its way. */
class Answer {
  constructor(body, scroller) {
    this.flow = new TextFlow(body, scroller);
    Object.assign(this, { text: "", tokens: 0, usage: null, reason: null, started: performance.now(), first: 0, last: 0 });
  }

  /** One more piece, with which the answer has so many tokens. */
  take(text, tokens, tokenView) {
    this.last = performance.now();
    this.first ||= this.last;
    if (tokens === this.tokens) tokenView.extend(text);
    // Tokens whose text was held back come along with the one that releases it.
    for (; this.tokens < tokens; this.tokens++) tokenView.add(this.tokens === tokens - 1 ? text : "");
    this.text += text;
    this.flow.add(text);
  }

  /** What there is to say of it: texts and elements. */
  note() {
    const bold = (text) => element("b", "", text), facts = [], kv = this.usage?.kv;
    if (kv) {
      const written = kv.retained_entries + kv.evicted_entries, kept = share(written ? kv.retained_entries / written : 0);
      facts.push(["kept ", bold(kept), ` of ${number(written)} entries`]);
      facts.push([bold(bytes(kv.bytes)), ` instead of ${bytes(kv.dense_bytes)}`]);
    }
    if (this.first) {
      facts.push([`first token after ${((this.first - this.started) / 1000).toFixed(2)} s`]);
      const seconds = Math.max((this.last - this.first) / 1000, 1e-3);
      if (this.tokens > 1) facts.push([`${((this.tokens - 1) / seconds).toFixed(1)} tokens/s`]);
    }
    if (this.reason === "length") facts.push(["cut at the longest answer"]);
    else if (this.reason && this.reason !== "stop") facts.push([this.reason]);
    return facts.flatMap((fact, nth) => (nth ? [" · ", ...fact] : fact));
  }
}

function addError(article, message) {
  const error = element("div", "error", message);
  error.setAttribute("role", "alert");
  article.append(error);
}
