// The page: a chat on the left, the cache of the running answer on the right. One file, since a page without a build
// step has one script. Parts, in order: the server, canvases (time, heat, tokens), what is watched, the chat, controls.
// Everything that grows with an answer is appended or drawn for the visible part only, at most once a frame.

const $ = (id) => document.getElementById(id);
const number = (value) => Math.round(value).toLocaleString("en");
const share = (value) => `${value >= 0.0995 || value === 0 ? Math.round(value * 100) : (value * 100).toFixed(1)} %`;
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  for (; count >= 1024 && unit < units.length - 1; unit++) count /= 1024;
  return `${unit && count < 100 ? count.toFixed(1) : Math.round(count)} ${units[unit]}`;
}

// ---- the server --------------------------------------------------------------------------------------------------

class ApiError extends Error {
  constructor(status, message, retryAfter) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

/** An answer of the API, or an ApiError with the server's own words. Paths are relative: a proxy may add a prefix. */
async function call(path, { body, signal } = {}) {
  const headers = {};
  const key = $("key").value.trim();
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  if (answer.ok) return answer;
  const text = await answer.text();
  let message = text.slice(0, 300) || answer.statusText;
  try {
    message = JSON.parse(text).error.message;
  } catch { /* not the API's envelope: a proxy's own page */ }
  if (answer.status === 401 || answer.status === 403) askForKey();
  throw new ApiError(answer.status, message, Number(answer.headers.get("Retry-After")) || 0);
}

const getJson = async (path, options) => (await call(path, options)).json();

/** The data of server-sent events, parsed, up to [DONE]. */
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
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

// ---- drawing -----------------------------------------------------------------------------------------------------

const FONT = '12.5px ui-monospace, "SF Mono", "Cascadia Mono", "DejaVu Sans Mono", Menlo, Consolas, monospace';
const SMALL = '11px system-ui, -apple-system, "Segoe UI", "Noto Sans", "DejaVu Sans", sans-serif';
const colours = {};
const views = [];
let isFrameAsked = false;

function readColours() {
  const style = getComputedStyle(document.documentElement);
  for (const name of ["ink", "soft", "faint", "line", "card", "held", "mark"]) colours[name] = style.getPropertyValue(`--${name}`);
  for (const view of views) view.touch();
}

/** A canvas that draws itself when something has changed, sharp on every screen, once a frame at most. */
class View {
  constructor(canvas) {
    this.canvas = canvas;
    this.brush = canvas.getContext("2d");
    this.width = this.height = 0;
    this.isDirty = false;
    views.push(this);
    new ResizeObserver(() => this.resize()).observe(canvas);
  }

  resize() {
    const scale = devicePixelRatio || 1;
    this.width = this.canvas.clientWidth;
    this.height = this.canvas.clientHeight;
    this.canvas.width = Math.round(this.width * scale);
    this.canvas.height = Math.round(this.height * scale);
    this.brush.setTransform(scale, 0, 0, scale, 0, 0);
    this.touch();
  }

  touch() {
    this.isDirty = true;
    if (isFrameAsked) return;
    isFrameAsked = true;
    requestAnimationFrame(() => {
      isFrameAsked = false;
      for (const view of views) {
        if (!view.isDirty || !view.width) continue;
        view.isDirty = false;
        view.brush.clearRect(0, 0, view.width, view.height);
        view.draw(view.brush);
      }
    });
  }

  /** The place of a pointer within the canvas. */
  at(event) {
    const box = this.canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  }
}

/** How strongly something held is coloured: the root of its share, so that one stream of many still shows. */
const strength = (part) => (part > 0 ? 0.12 + 0.88 * Math.sqrt(part) : 0);

/** Entries of all tokens seen, and entries held, over time. */
class TimeView extends View {
  constructor(canvas) {
    super(canvas);
    this.chosen = -1;
    this.clear();
    canvas.addEventListener("pointermove", (event) => this.choose(this.nearest(this.at(event)[0])));
    canvas.addEventListener("pointerleave", () => this.choose(-1));
    canvas.addEventListener("blur", () => this.choose(-1));
    canvas.addEventListener("keydown", (event) => {
      const last = this.points.length - 1, from = this.chosen < 0 ? last + (event.key === "ArrowLeft" ? 1 : -1) : this.chosen;
      const to = { ArrowLeft: from - 1, ArrowRight: from + 1, Home: 0, End: last }[event.key];
      if (to === undefined || last < 0) return;
      event.preventDefault();
      this.choose(clamp(to, 0, last));
    });
  }

  clear() {
    this.points = [];
    this.ceiling = null;
    this.choose(-1);
  }

  add(point) {
    this.points.push(point);
    // Long answers keep their shape at half the points.
    if (this.points.length > 1200) this.points = this.points.filter((_, nth) => nth % 2 === 0 || nth > 1100);
    this.touch();
  }

  scales() {
    const last = this.points.at(-1), left = 4, right = 64, top = 8, bottom = 17;
    const span = Math.max(last?.seconds ?? 0, 2), most = Math.max(last?.logical ?? 0, this.ceiling ?? 0, 1) * 1.06;
    return {
      x: (seconds) => left + (seconds / span) * (this.width - left - right),
      y: (entries) => this.height - bottom - (entries / most) * (this.height - top - bottom),
      span, left, right, bottom,
    };
  }

  nearest(x) {
    const { x: place } = this.scales();
    let best = -1;
    this.points.forEach((point, nth) => {
      if (best < 0 || Math.abs(place(point.seconds) - x) < Math.abs(place(this.points[best].seconds) - x)) best = nth;
    });
    return best;
  }

  choose(nth) {
    this.chosen = nth;
    const point = this.points?.[nth];
    $("r-time").textContent = point
      ? `${point.seconds.toFixed(1)} s: ${number(point.physical)} of ${number(point.logical)} entries` : "";
    this.touch();
  }

  draw(brush) {
    const { x, y, span, left, right, bottom } = this.scales();
    const base = this.height - bottom, edge = this.width - right;
    brush.font = SMALL;
    brush.lineWidth = 1;
    brush.strokeStyle = colours.line;
    brush.beginPath();
    brush.moveTo(left, base + 0.5);
    brush.lineTo(edge, base + 0.5);
    brush.stroke();
    if (!this.points.length) {
      brush.fillStyle = colours.soft;
      brush.fillText("Ask something: the two lines part where the cache begins to forget.", left + 6, base - 12);
      return;
    }
    brush.fillStyle = colours.soft;
    const every = [0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800].find((step) => span / step <= 7) ?? 3600;
    for (let tick = 0; tick <= span; tick += every) {
      const text = `${tick} s`;
      brush.fillText(text, clamp(x(tick) - brush.measureText(text).width / 2, left, edge - 18), this.height - 3);
    }
    if (this.ceiling) {
      brush.setLineDash([3, 4]);
      brush.strokeStyle = colours.soft;
      brush.beginPath();
      brush.moveTo(left, y(this.ceiling));
      brush.lineTo(edge, y(this.ceiling));
      brush.stroke();
      brush.setLineDash([]);
    }
    const trace = (field) => {
      brush.beginPath();
      this.points.forEach((point, nth) => (nth ? brush.lineTo(x(point.seconds), y(point[field])) : brush.moveTo(x(point.seconds), y(point[field]))));
    };
    trace("physical");
    brush.lineTo(x(this.points.at(-1).seconds), base);
    brush.lineTo(x(this.points[0].seconds), base);
    brush.closePath();
    brush.globalAlpha = 0.22;
    brush.fillStyle = colours.held;
    brush.fill();
    brush.globalAlpha = 1;
    trace("physical");
    brush.strokeStyle = colours.held;
    brush.lineWidth = 2.4;
    brush.lineJoin = "round";
    brush.stroke();
    trace("logical");
    brush.strokeStyle = colours.faint;
    brush.lineWidth = 1.8;
    brush.stroke();
    this.label(brush, x, y);
    const chosen = this.points[this.chosen];
    if (!chosen) return;
    brush.strokeStyle = colours.mark;
    brush.lineWidth = 1;
    brush.beginPath();
    brush.moveTo(x(chosen.seconds), 4);
    brush.lineTo(x(chosen.seconds), base);
    brush.stroke();
  }

  /** What the lines' ends stand for, at the right; pushed apart where they meet. */
  label(brush, x, y) {
    const last = this.points.at(-1), at = x(last.seconds) + 6;
    const marks = [[y(last.logical), compact(last.logical), colours.soft], [y(last.physical), compact(last.physical), colours.held]];
    if (this.ceiling) marks.push([y(this.ceiling), "budget", colours.soft]);
    marks.sort((one, other) => one[0] - other[0]);
    for (let nth = 1; nth < marks.length; nth++) marks[nth][0] = Math.max(marks[nth][0], marks[nth - 1][0] + 12);
    const over = marks.at(-1)[0] - (this.height - 22);
    marks.forEach(([height, text, colour]) => {
      brush.fillStyle = colour;
      brush.fillText(text, text === "budget" ? this.width - 58 : Math.min(at, this.width - 58), height + 4 - Math.max(over, 0));
    });
  }
}

const compact = (value) => (value < 10_000 ? number(value) : value < 999_500 ? `${(value / 1000).toFixed(value < 100_000 ? 1 : 0)} k` : `${(value / 1e6).toFixed(1)} M`);

/** Entries of every stream: layers from left to right, heads from top to bottom. */
class HeatView extends View {
  constructor(canvas, onPick) {
    super(canvas);
    this.onPick = onPick;
    this.entries = [];
    this.cursor = this.picked = null;
    canvas.addEventListener("pointermove", (event) => this.choose(this.cellAt(event)));
    canvas.addEventListener("pointerleave", () => this.choose(null));
    canvas.addEventListener("click", (event) => this.pick(this.cellAt(event)));
    canvas.addEventListener("keydown", (event) => this.onKey(event));
  }

  show(entries, seen) {
    this.entries = entries;
    this.seen = seen;
    let most = 0;
    for (const layer of entries) for (const held of layer) if (held > most) most = held;
    this.most = most;
    // Eight heads need more room than three.
    const high = entries.length ? `${clamp(entries[0].length * 15 + 18, 99, 200)}px` : "";
    if (this.canvas.style.height !== high) this.canvas.style.height = high;
    $("heat-top").textContent = most ? `${number(most)} entries` : "full";
    this.choose(this.cursor);
  }

  cells() {
    const layers = this.entries.length || 30, heads = this.entries[0]?.length || 3, left = 22, bottom = 15;
    return { layers, heads, left, wide: (this.width - left) / layers, high: (this.height - bottom) / heads };
  }

  cellAt(event) {
    const [x, y] = this.at(event), { layers, heads, left, wide, high } = this.cells();
    if (!this.entries.length || x < left || y > high * heads) return null;
    return { layer: clamp(Math.floor((x - left) / wide), 0, layers - 1), head: clamp(Math.floor(y / high), 0, heads - 1) };
  }

  choose(cell) {
    this.cursor = cell;
    const shown = cell ?? this.picked, held = shown && this.entries[shown.layer]?.[shown.head];
    $("r-heat").textContent = shown && held !== undefined
      ? `layer ${shown.layer}, head ${shown.head}: ${number(held)} of ${number(this.seen)} tokens` : "";
    this.touch();
  }

  pick(cell) {
    const isSame = cell && this.picked && cell.layer === this.picked.layer && cell.head === this.picked.head;
    this.picked = isSame ? null : cell;
    this.choose(this.cursor);
    this.onPick(this.picked);
  }

  onKey(event) {
    if (!this.entries.length) return;
    const { layers, heads } = this.cells(), at = this.cursor ?? this.picked ?? { layer: 0, head: 0 };
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], Home: [-layers, 0], End: [layers, 0] };
    if (moves[event.key]) {
      const [across, down] = this.cursor || this.picked ? moves[event.key] : [0, 0];
      this.choose({ layer: clamp(at.layer + across, 0, layers - 1), head: clamp(at.head + down, 0, heads - 1) });
    } else if (event.key === "Enter" || event.key === " ") this.pick(this.cursor);
    else if (event.key === "Escape" && this.picked) this.pick(null);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  draw(brush) {
    const { layers, heads, left, wide, high } = this.cells(), gap = wide > 9 ? 2 : 1;
    brush.font = SMALL;
    for (let layer = 0; layer < layers; layer++) {
      for (let head = 0; head < heads; head++) {
        const held = this.entries[layer]?.[head] ?? 0;
        const box = [left + layer * wide, head * high, wide - gap, high - gap];
        brush.globalAlpha = 0.55;
        brush.fillStyle = colours.line;
        brush.fillRect(...box);
        brush.globalAlpha = held ? 0.08 + 0.92 * (held / this.most) : 0;
        brush.fillStyle = colours.held;
        brush.fillRect(...box);
      }
    }
    brush.globalAlpha = 1;
    brush.fillStyle = colours.soft;
    const every = [1, 2, 5, 10, 20].find((step) => step * wide > 26) ?? 50;
    for (let layer = 0; layer < layers; layer += every) brush.fillText(String(layer), left + layer * wide, this.height - 3);
    for (let head = 0; head < heads; head += high > 12 ? 1 : 2) brush.fillText(String(head), 4, head * high + high / 2 + 3);
    for (const [cell, colour] of [[this.picked, colours.ink], [this.cursor, colours.mark]]) {
      if (!cell) continue;
      brush.strokeStyle = colour;
      brush.lineWidth = 2;
      brush.strokeRect(left + cell.layer * wide - 1, cell.head * high - 1 + (cell.head ? 0 : 2), wide - gap + 2, high - gap + (cell.head ? 2 : 0));
    }
  }
}

/** The prompt and the answer, token by token. Lines are laid out as tokens come; only the visible ones are drawn. */
class TokenView extends View {
  constructor(canvas, scroller, spacer) {
    super(canvas);
    Object.assign(this, { scroller, spacer, lineHeight: 20, widths: new Map() });
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
    this.x = [];
    this.width_ = [];
    this.line = [];
    this.firstOf = [0];
    this.places = { x: 0, line: 0 };
    this.prompt = this.seen = 0;
    this.holders = null;
    this.streams = 1;
    this.chosen = -1;
    this.top = 0;
    this.isFollowing = false; // a reader at the end stays at the end
    this.scroller.scrollTop = 0;
    $("r-tokens").textContent = "";
    this.grow();
    this.touch();
  }

  /** Tokens of the prompt; without their texts, only how many there are. */
  setPrompt(texts, count) {
    const answer = this.texts.slice(this.prompt);
    this.prompt = texts?.length ?? count;
    this.texts = [...(texts ?? new Array(count).fill("·")), ...answer];
    this.layOutAll();
  }

  add(text) {
    this.texts.push(text);
    this.layOut(this.texts.length - 1);
    this.grow();
    if (this.places.line * this.lineHeight <= this.top + this.height) this.touch();
  }

  /** How far one can scroll. */
  end() {
    return Math.max((this.places.line + 1) * this.lineHeight + 6 - this.height, 0);
  }

  /** More text of the last token. */
  extend(text) {
    const nth = this.texts.length - 1;
    if (nth < this.prompt || !text) return;
    this.places = { x: this.x[nth], line: this.line[nth] };
    this.firstOf.length = this.places.line + 1;
    this.texts[nth] += text;
    this.layOut(nth);
    this.touch();
  }

  show(holders, streams, seen) {
    Object.assign(this, { holders, streams, seen });
    this.describe();
    this.touch();
  }

  resize() {
    super.resize();
    this.layOutAll();
  }

  layOutAll() {
    Object.assign(this, { x: [], width_: [], line: [], firstOf: [0], places: { x: 0, line: 0 } });
    for (let nth = 0; nth < this.texts.length; nth++) this.layOut(nth);
    this.grow();
    this.touch();
  }

  layOut(nth) {
    const place = this.places;
    let wide = this.measure(this.shown(nth));
    if (place.x > 0 && place.x + wide > this.width - 10) this.breakLine(nth);
    if (place.x === 0) wide = this.measure(this.atStart(nth));
    this.x[nth] = place.x;
    this.width_[nth] = wide;
    this.line[nth] = place.line;
    place.x += wide + 1;
    // Empty lines of a prompt would only be scrolled over: a break is shown, and any number of them is one.
    if (this.texts[nth].includes("\n")) this.breakLine(nth + 1);
  }

  breakLine(nth) {
    this.places.line += 1;
    this.places.x = 0;
    this.firstOf[this.places.line] = nth;
  }

  shown(nth) {
    return this.texts[nth].replace(/\n/g, "⏎").replace(/\t/g, "⇥") || "·";
  }

  /** Without the space before it, at the start of a line. */
  atStart(nth) {
    return this.shown(nth).trimStart() || " ";
  }

  measure(text) {
    let wide = this.widths.get(text);
    if (wide === undefined) {
      this.brush.font = FONT;
      wide = Math.min(this.brush.measureText(text).width, Math.max(this.width - 12, 40));
      if (this.widths.size > 20_000) this.widths.clear();
      this.widths.set(text, wide);
    }
    return wide;
  }

  grow() {
    const high = `${(this.places.line + 1) * this.lineHeight + 6}px`;
    if (this.high === high) return;
    this.spacer.style.height = this.high = high;
    if (this.isFollowing) this.scroller.scrollTop = this.top = this.end();
  }

  tokenAt(event) {
    const [x, y] = this.at(event), line = Math.floor((y + this.top - 2) / this.lineHeight);
    if (line < 0 || line >= this.firstOf.length) return -1;
    const end = this.firstOf[line + 1] ?? this.texts.length;
    for (let nth = this.firstOf[line]; nth < end; nth++) if (x < this.x[nth] + this.width_[nth] + 1) return x >= this.x[nth] ? nth : -1;
    return -1;
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
      $("r-tokens").textContent = "";
      return;
    }
    const where = nth < this.prompt ? `prompt ${number(nth)}` : `answer ${number(nth - this.prompt)}`;
    const held = this.holders?.[nth];
    let state = "not read yet";
    if (held !== undefined && nth < this.seen) {
      state = this.streams > 1 ? `held by ${number(held)} of ${number(this.streams)}` : held ? "held here" : "forgotten here";
    }
    $("r-tokens").textContent = `${where} “${this.shown(nth).trim().slice(0, 24)}”: ${state}`;
  }

  onKey(event) {
    const last = this.texts.length - 1;
    if (last < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    const at = this.chosen < 0 ? this.firstVisible() : this.chosen, isNew = this.chosen < 0;
    const beside = (lines) => {
      const line = clamp(this.line[at] + lines, 0, this.firstOf.length - 1), end = (this.firstOf[line + 1] ?? this.texts.length) - 1;
      let nth = Math.min(this.firstOf[line], last);
      while (nth < end && this.x[nth] + this.width_[nth] < this.x[at]) nth++;
      return nth;
    };
    const page = Math.max(Math.floor(this.height / this.lineHeight) - 1, 1);
    const moves = {
      ArrowLeft: () => at - 1, ArrowRight: () => at + 1, ArrowUp: () => beside(-1), ArrowDown: () => beside(1),
      PageUp: () => beside(-page), PageDown: () => beside(page), Home: () => 0, End: () => last,
    };
    if (!moves[event.key]) return;
    event.preventDefault();
    this.choose(clamp(isNew && !["Home", "End"].includes(event.key) ? at : moves[event.key](), 0, last));
    const top = this.line[this.chosen] * this.lineHeight;
    if (top < this.top) this.scroller.scrollTop = top;
    else if (top + this.lineHeight + 4 > this.top + this.height) this.scroller.scrollTop = top + this.lineHeight + 4 - this.height;
  }

  firstVisible() {
    return Math.min(this.firstOf[Math.floor(this.top / this.lineHeight)] ?? 0, this.texts.length - 1);
  }

  draw(brush) {
    brush.font = FONT;
    if (!this.texts.length) {
      brush.font = SMALL;
      brush.fillStyle = colours.soft;
      brush.fillText("Here the prompt and the answer, each token as dark as there are streams that hold it.", 4, 16);
      return;
    }
    const { top } = this, first = Math.max(Math.floor(top / this.lineHeight), 0);
    const end = this.firstOf[Math.ceil((top + this.height) / this.lineHeight)] ?? this.texts.length;
    for (let nth = this.firstOf[first] ?? this.texts.length; nth < end; nth++) {
      const y = this.line[nth] * this.lineHeight - top + 2, isSeen = nth < this.seen, held = this.holders?.[nth] ?? 0;
      const strong = isSeen ? strength(held / this.streams) : 0;
      if (strong) {
        brush.globalAlpha = strong;
        brush.fillStyle = colours.held;
        brush.fillRect(this.x[nth], y, this.width_[nth], this.lineHeight - 3);
      }
      brush.globalAlpha = isSeen ? 1 : 0.55;
      brush.fillStyle = isSeen && this.holders && !held ? colours.faint : strong > 0.65 ? "#1f1402" : colours.ink;
      brush.fillText(this.x[nth] ? this.shown(nth) : this.atStart(nth), this.x[nth], y + 13);
      brush.globalAlpha = 1;
      if (nth === this.prompt) {
        brush.fillStyle = colours.mark;
        brush.fillRect(this.x[nth] - 1.5, y, 2, this.lineHeight - 3);
      }
      if (nth === this.chosen) {
        brush.strokeStyle = colours.mark;
        brush.lineWidth = 1.6;
        brush.strokeRect(this.x[nth] - 0.5, y - 0.5, this.width_[nth] + 1, this.lineHeight - 2);
      }
    }
  }
}

// ---- what is watched ---------------------------------------------------------------------------------------------

const timeView = new TimeView($("time"));
const heatView = new HeatView($("heat"), onPickStream);
const tokenView = new TokenView($("token-canvas"), $("tokens"), $("token-height"));
const FASTEST_POLL = 200;
let entryBytes = 0;
let denseBytes = 0;
let watched = null;

/** Looks at one request's cache until it has ended; a slow server or a large answer is asked less often. */
class Watcher {
  constructor(id) {
    this.id = id;
    this.started = performance.now();
    this.isOver = false;
  }

  async loop() {
    while (watched === this && !this.isOver) {
      const asked = performance.now();
      await this.look();
      const pause = Math.max(FASTEST_POLL, 4 * (performance.now() - asked)) * (document.hidden ? 5 : 1);
      await new Promise((resume) => setTimeout(resume, pause));
    }
  }

  async look() {
    const picked = heatView.picked;
    const query = picked ? `?layer=${picked.layer}&head=${picked.head}` : "";
    try {
      const detail = await getJson(`v1/kv/${encodeURIComponent(this.id)}${query}`);
      if (watched === this) this.show(detail, picked);
    } catch (error) {
      // Gone: a minute has passed. Anything else, a server that is busy, may be over at the next look.
      if (error.status === 404) this.isOver = true;
    }
  }

  /** The answer has ended: one last look shows what was left. */
  async end() {
    this.isOver = true;
    await this.look();
  }

  show(detail, picked) {
    this.detail = detail;
    const streams = detail.num_layers * detail.num_heads;
    const seconds = (performance.now() - this.started) / 1000 - detail.age_seconds;
    const isNew = !(timeView.points.at(-1)?.logical >= detail.entries_logical && detail.phase === "ended");
    if (isNew && detail.phase !== "waiting") {
      timeView.ceiling = detail.budget.kv_budget ? detail.budget.kv_budget * streams : null;
      timeView.add({ seconds: Math.max(seconds, timeView.points.at(-1)?.seconds ?? 0), logical: detail.entries_logical, physical: detail.entries_physical });
    }
    heatView.show(detail.head_entries, detail.seen_tokens);
    if (!tokenView.prompt && detail.prompt_tokens) tokenView.setPrompt(null, detail.prompt_tokens);
    if (picked && detail.positions) {
      const holders = new Uint8Array(detail.seen_tokens);
      for (const position of detail.positions[0].positions) holders[position] = 1;
      tokenView.show(holders, 1, detail.seen_tokens);
    } else if (!picked) tokenView.show(detail.token_streams, streams, detail.seen_tokens);
    showTiles(detail);
  }
}

function showTiles(detail) {
  const read = Math.min(detail.seen_tokens / detail.prompt_tokens, 1);
  const phase = { waiting: "waiting", prefill: `reading ${Math.round(read * 100)} %`, decode: "answering", ended: "ended" }[detail.phase];
  setText("t-phase", phase ?? detail.phase);
  setText("t-seen", number(detail.seen_tokens));
  setText("t-kept", detail.entries_logical ? share(detail.entries_physical / detail.entries_logical) : "–");
  setText("t-bytes", entryBytes ? bytes(detail.entries_physical * entryBytes) : number(detail.entries_physical));
  setText("t-dense", entryBytes && detail.entries_logical ? `dense: ${bytes(detail.entries_logical * denseBytes)}` : "memory");
  setText("t-cuts", number(detail.evictions));
}

function clearTiles() {
  for (const id of ["t-seen", "t-kept", "t-bytes", "t-cuts"]) setText(id, "–");
  setText("t-phase", "idle");
  setText("t-dense", "memory");
}

function setText(id, text) {
  if ($(id).textContent !== text) $(id).textContent = text;
}

function onPickStream(picked) {
  $("tokens-title").textContent = picked ? `Tokens of layer ${picked.layer}, head ${picked.head}` : "Tokens";
  $("all-streams").hidden = !picked;
  watched?.look();
}

// ---- the chat ----------------------------------------------------------------------------------------------------

const SAMPLING = ["temperature", "top_p", "top_k", "repetition_penalty", "max_tokens", "seed"];
let history = [];
let running = null;

const PARAGRAPHS_A_PART = 16;
// Milliseconds between two additions: nobody reads faster, and a long page is costly to lay out.
const TEXT_PAUSE = 40;

/**
 * Text that grows by paragraphs: a finished one is dressed once, and never touched again. Some of them are one part,
 * which the browser neither lays out nor paints while it is out of sight.
 */
class TextFlow {
  constructor(body) {
    this.body = body;
    this.part = null;
    this.waiting = "";
    this.tail = null;
    this.isAsked = false;
  }

  add(text) {
    this.waiting += text;
    if (this.isAsked) return;
    this.isAsked = true;
    setTimeout(() => requestAnimationFrame(() => this.flush()), TEXT_PAUSE);
  }

  flush() {
    this.isAsked = false;
    const wasAtEnd = isAtEnd();
    let text = this.waiting;
    this.waiting = "";
    while (text) {
      if (!this.tail) {
        text = text.replace(/^\n+/, "");
        if (!text) break;
        this.tail = document.createElement("p");
        this.tail.append("");
        if (!this.part || this.part.childElementCount >= PARAGRAPHS_A_PART) {
          this.part = document.createElement("div");
          this.part.className = "part";
          this.body.append(this.part);
        }
        this.part.append(this.tail);
      }
      const node = this.tail.firstChild, before = node.length;
      // A blank line may have begun in the piece before.
      const joined = node.data.slice(-1) + text, kept = Math.min(before, 1);
      const isCode = node.data.startsWith("```") || (!before && text.startsWith("```"));
      const stop = isCode ? joined.indexOf("\n```", before ? 0 : 3) : joined.indexOf("\n\n");
      if (stop < 0) {
        node.appendData(text);
        break;
      }
      const length = Math.max((isCode ? stop + 4 : stop) - kept, 0);
      node.appendData(text.slice(0, length));
      text = text.slice(length);
      this.close();
    }
    if (wasAtEnd) $("log").scrollTop = $("log").scrollHeight;
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

/** Code blocks, `code` and **bold**, by nodes alone: a model's text never becomes markup. */
function dress(paragraph) {
  const text = paragraph.textContent.replace(/\n+$/, "");
  const block = /^```[^\n]*\n([\s\S]*?)(?:\n?```)?$/.exec(text);
  if (block) {
    const pre = document.createElement("pre");
    pre.textContent = block[1];
    paragraph.replaceWith(pre);
    return;
  }
  const pieces = text.replace(/^#{1,6} (.*)$/gm, "**$1**").split(/(\*\*[^*\n]+\*\*|`[^`\n]+`)/);
  paragraph.replaceChildren(...pieces.filter(Boolean).map((piece) => {
    const tag = piece.length > 4 && piece.startsWith("**") && piece.endsWith("**") ? "strong" : piece.length > 2 && piece.startsWith("`") && piece.endsWith("`") ? "code" : null;
    if (!tag) return document.createTextNode(piece);
    const node = document.createElement(tag);
    node.textContent = tag === "strong" ? piece.slice(2, -2) : piece.slice(1, -1);
    return node;
  }));
}

const isAtEnd = () => $("log").scrollHeight - $("log").scrollTop - $("log").clientHeight < 60;

function addArticle(kind) {
  $("welcome").hidden = true;
  const article = document.createElement("article"), body = document.createElement("div");
  article.className = kind;
  article.setAttribute("aria-label", kind === "user" ? "You" : "Answer");
  body.className = "body";
  article.append(body);
  $("log").append(article);
  return article;
}

function addNote(article, className, ...parts) {
  const note = document.createElement("div");
  note.className = className;
  note.append(...parts);
  article.append(note);
}

function requestBody() {
  const system = $("system").value.trim();
  const body = {
    model: $("model").value,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...history],
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
  };
  for (const name of SAMPLING) {
    if ($(name).value !== "") body[name] = Number($(name).value);
  }
  if (!$("budget").disabled) body.kv_budget = budgets[$("budget").value];
  return body;
}

async function send(text) {
  if (running || !text.trim()) return;
  const talk = history; // a new chat begins another
  talk.push({ role: "user", content: text });
  const question = document.createElement("p");
  question.textContent = text;
  addArticle("user").firstChild.append(question);
  const article = addArticle("assistant busy");
  article.setAttribute("aria-busy", "true");
  $("log").scrollTop = $("log").scrollHeight;
  const mine = new AbortController();
  running = mine;
  setBusy(true);
  const answer = { text: "", flow: new TextFlow(article.firstChild), tokens: 0, usage: null, reason: null, started: performance.now(), first: 0, last: 0 };
  try {
    await stream(answer, mine);
  } catch (error) {
    if (error.name === "AbortError") answer.reason = "stopped";
    else addNote(article, "error", error instanceof ApiError ? error.message : `The connection broke: ${error.message}`);
  }
  answer.flow.end();
  article.classList.remove("busy");
  article.removeAttribute("aria-busy");
  talk.push({ role: "assistant", content: answer.text });
  if (!answer.text) talk.splice(-2);
  if (running === mine) await watched?.end();
  note(article, answer);
  if (isAtEnd()) $("log").scrollTop = $("log").scrollHeight;
  if (running !== mine) return;
  running = null;
  setBusy(false);
  showPool();
}

async function stream(answer, mine) {
  const body = requestBody();
  watched = null;
  tokenView.clear();
  timeView.clear();
  heatView.show(heatView.entries.map((layer) => layer.map(() => 0)), 0);
  clearTiles();
  showPrompt(body, mine);
  const response = await call("v1/chat/completions", { body, signal: mine.signal });
  // Known before the first token, so that reading the prompt can be watched too.
  watch(response.headers.get("X-Trimkv-Id"));
  for await (const chunk of events(response)) {
    if (chunk.error) throw new ApiError(500, chunk.error.message);
    if (!watched) watch(chunk.id);
    const choice = chunk.choices[0];
    answer.usage = chunk.usage?.kv ? chunk.usage : answer.usage;
    answer.reason = choice?.finish_reason ?? answer.reason;
    if (choice?.delta.content === undefined || choice.delta.role) continue;
    take(answer, choice.delta.content, chunk.usage?.completion_tokens ?? answer.tokens + 1);
  }
}

/** One more piece of the answer, with which it has so many tokens. */
function take(answer, text, tokens) {
  answer.first ||= performance.now();
  answer.last = performance.now();
  if (tokens === answer.tokens) tokenView.extend(text);
  // Tokens whose text was held back come along with the one that releases it.
  for (; answer.tokens < tokens; answer.tokens++) tokenView.add(answer.tokens === tokens - 1 ? text : "");
  answer.text += text;
  answer.flow.add(text);
}

function watch(id) {
  if (!id) return;
  watched = new Watcher(id);
  watched.loop();
}

/** The prompt's tokens, as the server cuts them. Without that endpoint, or the right to it, tokens stay without text. */
async function showPrompt({ model, messages }, mine) {
  try {
    const { token_strs: texts } = await getJson("tokenize", { body: { model, messages, return_token_strs: true } });
    if (texts && running === mine) tokenView.setPrompt(texts);
  } catch { /* shown as dots */ }
}

function note(article, answer) {
  const bold = (text) => Object.assign(document.createElement("b"), { textContent: text });
  const parts = [], kv = answer.usage?.kv;
  if (kv) {
    const written = kv.retained_entries + kv.evicted_entries;
    parts.push("kept ", bold(share(written ? kv.retained_entries / written : 0)), ` of ${number(written)} entries, `, bold(bytes(kv.bytes)), ` instead of ${bytes(kv.dense_bytes)}`);
  }
  if (answer.first) {
    parts.push(`${parts.length ? " · " : ""}first token after ${((answer.first - answer.started) / 1000).toFixed(2)} s`);
    if (answer.tokens > 1) parts.push(` · ${((answer.tokens - 1) / Math.max((answer.last - answer.first) / 1000, 1e-3)).toFixed(1)} tokens/s`);
  }
  if (answer.reason && answer.reason !== "stop") parts.push(`${parts.length ? " · " : ""}${answer.reason === "length" ? "cut at the longest answer" : answer.reason}`);
  if (parts.length) addNote(article, "note", ...parts);
}

function setBusy(isBusy) {
  $("send").hidden = isBusy;
  $("stop").hidden = !isBusy;
}

// ---- controls ----------------------------------------------------------------------------------------------------

const STEPS = [8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 16384, 32768, 65536, 131072];
const SAVED = [...SAMPLING, "system"];
const IDEAS = [
  ["Tell me how rivers begin and where they end.", "A short question, a long answer"],
  ["Write a story about a lighthouse keeper who collects sounds.", "Watch the story's beginning fade"],
  ["__long__", "A long text with one fact in it, then the question: does the fact survive?"],
];
const THEMES = ["", "light", "dark"];
const saved = JSON.parse(localStorage.getItem("trimkv") ?? "{}");
let budgets = [0];
let cards = [];

function save() {
  for (const name of SAVED) saved[name] = $(name).value;
  localStorage.setItem("trimkv", JSON.stringify(saved));
}

function longText() {
  const lines = ["Rivers begin as small streams in hills and mountains.", "Rain and melting snow feed them.", "They carve valleys and carry sand to the sea.", "Where they slow down, they drop what they carry."];
  const text = Array.from({ length: 40 }, (_, nth) => lines[nth % lines.length]);
  text.splice(17, 0, "The key to the boat house is under the blue stone.");
  return `${text.join(" ")}\n\nWhere is the key to the boat house?`;
}

/** What the chosen model allows: budgets from small to its whole context, then everything. */
function showBudgets() {
  const card = cards.find(({ id }) => id === $("model").value);
  if (!card) return;
  const most = Math.min(card.max_kv_budget ?? card.max_model_len, card.max_model_len);
  const steps = new Set(STEPS.filter((step) => step <= most && step >= (card.kv_sink_tokens || 1)));
  if (card.kv_budget) steps.add(card.kv_budget);
  budgets = card.has_gates ? [...steps].sort((one, other) => one - other) : [];
  if (card.allow_dense || !card.has_gates) budgets.push(0);
  const wanted = saved["budget-value"] ?? card.kv_budget;
  const at = budgets.indexOf(wanted);
  $("budget").max = budgets.length - 1;
  $("budget").disabled = !card.has_gates;
  $("budget").value = at >= 0 ? at : Math.max(budgets.indexOf(card.kv_budget), 0);
  showBudget();
}

function showBudget() {
  const budget = budgets[$("budget").value], bold = document.createElement("b");
  bold.textContent = budget ? number(budget) : "Everything";
  const words = budget ? "entries a head" : $("budget").disabled ? "(a model without gates)" : "is kept (dense)";
  $("budget").style.setProperty("--part", $("budget").value / Math.max($("budget").max, 1));
  $("budget-text").replaceChildren(bold, ` ${words}`);
  $("budget").setAttribute("aria-valuetext", `${bold.textContent} ${words}`);
}

async function showPool() {
  try {
    const { pool, queue, requests } = await getJson("v1/kv");
    entryBytes = pool.entry_bytes;
    denseBytes = pool.dense_entry_bytes ?? pool.entry_bytes;
    $("pool").className = "";
    $("pool").textContent = `${share(pool.usage)} of ${bytes(pool.bytes)} cache used · ${requests.length} running · ${queue.requests} waiting`;
    if (watched?.detail) showTiles(watched.detail);
  } catch (error) {
    complain(error);
  }
}

function complain(error) {
  $("pool").className = "bad";
  $("pool").textContent = error.message;
}

function askForKey() {
  $("key-box").open = true;
  $("key").focus();
}

async function connect() {
  try {
    const { data } = await getJson("v1/models");
    cards = data;
    const chosen = $("model").value;
    $("model").replaceChildren(...cards.map(({ id }) => new Option(id, id, false, id === chosen)));
    showBudgets();
    await showPool();
  } catch (error) {
    complain(error);
    if (error.status === 401 || error.status === 403) return;
    setTimeout(connect, 1000 * (error.retryAfter || 2));
  }
}

function setTheme(name) {
  document.documentElement.style.colorScheme = name || "light dark";
  $("theme").textContent = { light: "☀", dark: "☾" }[name] ?? "◐";
  $("theme").setAttribute("aria-label", `Colours: ${name || "as the system"}`);
  readColours();
}

function fitMessage() {
  $("message").style.height = "auto";
  $("message").style.height = `${$("message").scrollHeight}px`;
}

function newChat() {
  running?.abort();
  running = null;
  setBusy(false);
  history = [];
  for (const article of $("log").querySelectorAll("article")) article.remove();
  $("welcome").hidden = false;
  watched = null;
  timeView.clear();
  tokenView.clear();
  heatView.picked = null;
  heatView.show([], 0);
  onPickStream(null);
  clearTiles();
  $("message").focus();
}

function submit() {
  const text = $("message").value;
  if (running || !text.trim()) return;
  $("message").value = "";
  fitMessage();
  send(text);
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
$("message").addEventListener("input", fitMessage);
$("message").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
$("stop").addEventListener("click", () => {
  running?.abort();
  $("message").focus();
});
$("new-chat").addEventListener("click", newChat);
$("new-chat").setAttribute("aria-label", "New chat");
$("all-streams").addEventListener("click", () => heatView.pick(null));
$("model").addEventListener("change", showBudgets);
$("budget").addEventListener("input", () => {
  saved["budget-value"] = budgets[$("budget").value];
  showBudget();
  save();
});
for (const name of SAVED) {
  $(name).value = saved[name] ?? "";
  $(name).addEventListener("change", save);
}
$("key").value = sessionStorage.getItem("trimkv-key") ?? "";
$("key").addEventListener("change", () => sessionStorage.setItem("trimkv-key", $("key").value.trim()));
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("trimkv-key", $("key").value.trim());
  $("key-box").open = false;
  connect();
  $("message").focus();
});
$("theme").addEventListener("click", () => {
  saved.theme = THEMES[(THEMES.indexOf(saved.theme ?? "") + 1) % THEMES.length];
  setTheme(saved.theme);
  save();
});
document.addEventListener("keydown", (event) => {
  const open = document.querySelector("details.popover[open]");
  if (event.key === "Escape" && open) {
    open.open = false;
    open.firstElementChild.focus();
  } else if (event.key === "Escape" && running) running.abort();
  else if (event.key === "/" && !/^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName)) {
    event.preventDefault();
    $("message").focus();
  }
});
document.addEventListener("pointerdown", (event) => {
  for (const open of document.querySelectorAll("details.popover[open]")) if (!open.contains(event.target)) open.open = false;
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", readColours);
for (const [text, about] of IDEAS) {
  const button = document.createElement("button"), small = document.createElement("small");
  const question = text === "__long__" ? longText() : text;
  button.type = "button";
  small.textContent = about;
  button.append(question.length > 90 ? "Rivers, and where a key lies" : question, small);
  button.addEventListener("click", () => send(question));
  $("ideas").append(button);
}
// For who wants to look closer from the console, and for the tests.
globalThis.trimkv = { timeView, heatView, tokenView, watched: () => watched };
setInterval(() => running && !document.hidden && showPool(), 2000);
setTheme(saved.theme ?? "");
connect();
