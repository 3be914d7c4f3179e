// Text that grows line by line: a finished one is dressed once and never touched again. Knows no model.

import { element } from "./basics.js";

const FENCE = "```";
const LINES_A_PART = 16;
// Milliseconds between two additions: nobody reads faster, and a long page is costly to lay out.
const PAUSE_MS = 40;

export class TextFlow {
  /** `body` takes the lines; a reader at the end of `scroller` stays there. */
  constructor(body, scroller) {
    Object.assign(this, { body, scroller, part: null, tail: null, waiting: "", isAsked: false, hasGap: false });
  }

  add(text) {
    this.waiting += text;
    if (this.isAsked) return;
    this.isAsked = true;
    setTimeout(() => requestAnimationFrame(() => this.flush()), PAUSE_MS);
  }

  flush() {
    this.isAsked = false;
    const wasAtEnd = isAtEnd(this.scroller);
    let text = this.waiting;
    this.waiting = "";
    while (text) text = this.write(text);
    if (wasAtEnd) toEnd(this.scroller);
  }

  /** Add to the line or code block that grows, up to its end; returns the text behind it. */
  write(text) {
    if (!this.tail) {
      const rest = text.replace(/^\n+/, "");
      this.hasGap ||= rest.length < text.length;
      if (!rest) return "";
      text = rest;
      this.begin();
    }
    const node = this.tail.firstChild;
    const isCode = (node.data.slice(0, 3) + text).startsWith(FENCE);
    // The closing fence may have begun in the piece before.
    const kept = isCode ? node.data.slice(-FENCE.length) : "", end = isCode ? `\n${FENCE}` : "\n";
    const stop = (kept + text).indexOf(end);
    if (stop < 0) {
      node.appendData(text);
      return "";
    }
    const length = Math.max(stop + (isCode ? end.length : 0) - kept.length, 0);
    node.appendData(text.slice(0, length));
    this.close();
    return text.slice(isCode ? length : length + 1);
  }

  /** Some lines are one part, which the browser neither lays out nor paints while it is out of sight. */
  begin() {
    this.tail = element("p", this.hasGap ? "gap" : "", "");
    this.hasGap = false;
    if (!this.part || this.part.childElementCount >= LINES_A_PART) {
      this.part = element("div", "part");
      this.body.append(this.part);
    }
    this.part.append(this.tail);
  }

  close() {
    if (this.tail) dress(this.tail);
    this.tail = null;
  }

  end() {
    this.flush();
    this.close();
  }
}

export const isAtEnd = (scroller) => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 60;

export function toEnd(scroller) {
  scroller.scrollTop = scroller.scrollHeight;
}

/** Code blocks, `code` and **bold**, by nodes alone: a model's text never becomes markup. */
function dress(line) {
  const text = line.textContent.replace(/\n+$/, "");
  const block = /^```[^\n]*\n([\s\S]*?)(?:\n?```)?$/.exec(text);
  if (block) {
    const pre = element("pre", "", block[1]);
    pre.tabIndex = 0; // long lines are scrolled by keys as well
    line.replaceWith(pre);
    return;
  }
  const pieces = text.replace(/^#{1,6} (.*)$/gm, "**$1**").split(/(\*\*[^*\n]+\*\*|`[^`\n]+`)/);
  line.replaceChildren(...pieces.filter(Boolean).map(dressed));
}

function dressed(piece) {
  const marks = [["**", "strong"], ["`", "code"]];
  for (const [mark, tag] of marks) {
    if (piece.length <= 2 * mark.length || !piece.startsWith(mark) || !piece.endsWith(mark)) continue;
    return element(tag, "", piece.slice(mark.length, -mark.length));
  }
  return document.createTextNode(piece);
}
