// The prompt and the answer, token by token, each as strong as there are streams that hold it. Lines are laid out as
// tokens come; only the visible ones are drawn.

import { $, clamp, number } from "./basics.js";
import { SMALL, TEXT, View, box, colours } from "./view.js";

const LINE = 22;
const TOP = 2;
const FADE_MS = 260;
// More than this many in sight are drawn once and not on the way: a fade is worth no slow frame.
const MAX_FADING = 900;
// Text of what no stream holds, or is not read yet.
const PALE = 0.45;

/** How strongly something held is coloured: the root of its share, so that one stream of many still shows. */
const strength = (part) => (part > 0 ? 0.12 + 0.88 * Math.sqrt(part) : 0);

const isStill = matchMedia("(prefers-reduced-motion: reduce)");

export class TokenView extends View {
  constructor(canvas, scroller, spacer) {
    super(canvas);
    Object.assign(this, { scroller, spacer, widths: new Map(), strengths: new Float32Array(0) });
    this.clear();
    scroller.addEventListener("scroll", () => {
      this.top = scroller.scrollTop;
      this.isFollowing = this.top > 0 && this.end() - this.top < 30;
      this.touch();
    }, { passive: true });
    scroller.addEventListener("pointermove", (event) => this.choose(this.tokenAt(event)));
    scroller.addEventListener("pointerleave", () => this.choose(-1));
    scroller.addEventListener("keydown", (event) => this.onKey(event));
  }

  clear() {
    this.texts = [];
    /** Tokens of the prompt; those of the answer come after them. */
    this.prompt = 0;
    this.startLines();
    this.show(null, 1, 0);
    this.chosen = -1;
    this.top = 0;
    this.isFollowing = false; // a reader at the end stays at the end
    this.scroller.scrollTop = 0;
    $("r-tokens").textContent = "";
    this.grow();
  }

  // ---- what is shown

  /** Tokens of the prompt; without their texts, only how many there are. */
  setPrompt(texts, count) {
    const answer = this.texts.slice(this.prompt);
    this.prompt = texts?.length ?? count;
    this.texts = [...(texts ?? new Array(count).fill("·")), ...answer];
    this.layOutAll();
  }

  /** One more token of the answer. */
  add(text) {
    this.texts.push(text);
    this.layOut(this.texts.length - 1);
    this.grow();
    if (this.place.line * LINE <= this.top + this.height) this.touch();
  }

  /** More text of the last token. */
  extend(text) {
    const nth = this.texts.length - 1;
    if (nth < this.prompt || !text) return;
    this.texts[nth] += text;
    if (!this.width) return;
    this.place = { x: this.x[nth], line: this.line[nth] };
    this.firstOf.length = this.place.line + 1;
    this.layOut(nth);
    this.touch();
  }

  /** `holders`: of `streams` streams, how many hold each of the tokens `seen`; null where that is not known. */
  show(holders, streams, seen) {
    const before = new Float32Array(this.strengths.length), strengths = new Float32Array(holders?.length ?? 0);
    for (let nth = 0; nth < before.length; nth++) before[nth] = this.strengthOf(nth);
    for (let nth = 0; nth < strengths.length; nth++) strengths[nth] = strength(holders[nth] / streams);
    Object.assign(this, { holders, streams, seen, before, strengths });
    this.shownAt = isStill.matches ? -FADE_MS : performance.now();
    this.faded = isStill.matches ? 1 : 0;
    this.describe();
    this.touch();
  }

  /** What is drawn now: on the way from what was shown before to what is. */
  strengthOf(nth) {
    const from = this.before[nth] ?? 0;
    return from + ((this.strengths[nth] ?? 0) - from) * this.faded;
  }

  choose(nth) {
    if (nth === this.chosen) return;
    this.chosen = nth;
    this.describe();
    this.touch();
  }

  describe() {
    const nth = this.chosen, text = this.texts[nth];
    if (text === undefined) {
      $("r-tokens").textContent = this.seen && !this.holders ? "too many entries to list each" : "";
      return;
    }
    const where = nth < this.prompt ? `prompt ${number(nth)}` : `answer ${number(nth - this.prompt)}`;
    const held = this.holders?.[nth];
    let state = "not read yet";
    if (nth < this.seen) {
      if (held === undefined) state = "read";
      else state = this.streams > 1 ? `held by ${number(held)} of ${number(this.streams)}` : held ? "held here" : "forgotten here";
    }
    $("r-tokens").textContent = `${where} “${shown(text).trim().slice(0, 24)}”: ${state}`;
  }

  // ---- lines

  resize() {
    super.resize();
    this.layOutAll();
  }

  startLines() {
    Object.assign(this, { x: [], wide: [], line: [], drawn: [], firstOf: [0], place: { x: 0, line: 0 } });
  }

  layOutAll() {
    this.startLines();
    for (let nth = 0; nth < this.texts.length; nth++) this.layOut(nth);
    this.grow();
    this.touch();
  }

  layOut(nth) {
    if (!this.width) return; // not on the screen: laid out when it comes back
    const place = this.place, text = shown(this.texts[nth]);
    let wide = this.measure(text);
    if (place.x > 0 && place.x + wide > this.width - 8) this.breakLine(nth);
    if (place.x === 0) wide = this.measure(atStart(text));
    this.drawn[nth] = place.x ? text : atStart(text);
    this.x[nth] = place.x;
    this.wide[nth] = wide;
    this.line[nth] = place.line;
    place.x += wide + 1;
    // Empty lines of a prompt would only be scrolled over: a break is shown, and any number of them is one.
    if (this.texts[nth].includes("\n")) this.breakLine(nth + 1);
  }

  breakLine(nth) {
    this.place.line += 1;
    this.place.x = 0;
    this.firstOf[this.place.line] = nth;
  }

  measure(text) {
    let wide = this.widths.get(text);
    if (wide === undefined) {
      this.brush.font = TEXT;
      wide = this.brush.measureText(text).width;
      if (this.widths.size > 20_000) this.widths.clear();
      this.widths.set(text, wide);
    }
    return Math.min(wide, this.width - 12);
  }

  /** How far one can scroll. */
  end() {
    return Math.max((this.place.line + 1) * LINE + 6 - this.height, 0);
  }

  grow() {
    const high = `${(this.place.line + 1) * LINE + 6}px`;
    if (this.high === high) return;
    this.spacer.style.height = this.high = high;
    if (this.isFollowing) this.scroller.scrollTop = this.top = this.end();
  }

  // ---- pointer and keys

  tokenAt(event) {
    const [x, y] = this.at(event), line = Math.floor((y + this.top - TOP) / LINE);
    if (line < 0 || line >= this.firstOf.length) return -1;
    const end = this.firstOf[line + 1] ?? this.texts.length;
    for (let nth = this.firstOf[line]; nth < end; nth++) {
      if (x < this.x[nth] + this.wide[nth] + 1) return x >= this.x[nth] ? nth : -1;
    }
    return -1;
  }

  onKey(event) {
    const last = this.texts.length - 1;
    if (last < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    const isNew = this.chosen < 0, at = isNew ? this.firstVisible() : this.chosen;
    const page = Math.max(Math.floor(this.height / LINE) - 1, 1);
    const moves = {
      ArrowLeft: () => at - 1, ArrowRight: () => at + 1, ArrowUp: () => this.beside(at, -1), ArrowDown: () => this.beside(at, 1),
      PageUp: () => this.beside(at, -page), PageDown: () => this.beside(at, page), Home: () => 0, End: () => last,
    };
    if (!moves[event.key]) return;
    event.preventDefault();
    this.choose(clamp(isNew && !["Home", "End"].includes(event.key) ? at : moves[event.key](), 0, last));
    const top = this.line[this.chosen] * LINE;
    if (top < this.top) this.scroller.scrollTop = top;
    else if (top + LINE + 4 > this.top + this.height) this.scroller.scrollTop = top + LINE + 4 - this.height;
  }

  /** The token so many lines below another, or above it. */
  beside(at, lines) {
    const line = clamp(this.line[at] + lines, 0, this.firstOf.length - 1), last = this.texts.length - 1;
    const end = (this.firstOf[line + 1] ?? this.texts.length) - 1;
    let nth = Math.min(this.firstOf[line], last);
    while (nth < end && this.x[nth] + this.wide[nth] < this.x[at]) nth++;
    return nth;
  }

  firstVisible() {
    return Math.min(this.firstOf[Math.floor(this.top / LINE)] ?? 0, this.texts.length - 1);
  }

  // ---- drawing

  draw(brush, now) {
    if (!this.texts.length) {
      this.drawPromise(brush);
      return;
    }
    brush.font = TEXT;
    const first = this.firstOf[Math.max(Math.floor(this.top / LINE), 0)] ?? this.texts.length;
    const end = this.firstOf[Math.ceil((this.top + this.height) / LINE)] ?? this.texts.length;
    this.faded = end - first > MAX_FADING ? 1 : clamp((now - this.shownAt) / FADE_MS, 0, 1);
    if (this.faded < 1) this.touch();
    for (let nth = first; nth < end; nth++) this.drawToken(brush, nth);
  }

  /** What will be here, before there is anything. */
  drawPromise(brush) {
    brush.font = SMALL;
    brush.fillStyle = colours.soft;
    brush.fillText("Here the prompt and the answer: the more streams hold a token, the stronger its colour.", 2, 14);
    brush.fillStyle = colours.line;
    for (let line = 1, nth = 0; line < this.height / LINE; line++) {
      brush.globalAlpha = Math.max(0.55 - 0.07 * line, 0);
      for (let x = 0, wide = 0; x < this.width - 70; x += wide + 4, nth++) {
        wide = 14 + ((nth * 37) % 53);
        box(brush, [x, line * LINE + 6, wide, LINE - 8], 4);
      }
    }
    brush.globalAlpha = 1;
  }

  drawToken(brush, nth) {
    const x = this.x[nth], y = this.line[nth] * LINE - this.top + TOP, place = [x, y, this.wide[nth], LINE - 3];
    const strong = nth < this.seen ? this.strengthOf(nth) : 0;
    if (strong) {
      brush.globalAlpha = strong;
      brush.fillStyle = colours.held;
      box(brush, place, 4);
    }
    const isKnown = nth < this.seen && !this.holders;
    brush.globalAlpha = isKnown ? 1 : PALE + (1 - PALE) * Math.min(strong / 0.2, 1);
    brush.fillStyle = strong > 0.62 ? colours.onheld : colours.ink;
    brush.fillText(this.drawn[nth], x, y + 14, this.width - 12);
    brush.globalAlpha = 1;
    if (nth === this.prompt) {
      brush.fillStyle = colours.mark;
      box(brush, [x - 2, y, 2, LINE - 3], 1);
    }
    if (nth === this.chosen) {
      brush.strokeStyle = colours.mark;
      box(brush, [x + 0.5, y + 0.5, place[2] - 1, LINE - 4], 4, 1.8);
    }
  }
}

/** A token with its white space made visible. */
function shown(text) {
  return text.replace(/\n/g, "⏎").replace(/\t/g, "⇥") || "·";
}

/** Without the space before it, at the start of a line. */
function atStart(text) {
  return text.trimStart() || " ";
}
