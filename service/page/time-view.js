// Entries of all tokens seen, and entries held, over time.

import { $, clamp, compact, number } from "./basics.js";
import { SMALL, View, colours } from "./view.js";

const MAX_POINTS = 1200;
const MARGIN = { left: 2, right: 76, top: 8, bottom: 18 };
const TICKS = [0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800];

export class TimeView extends View {
  constructor(canvas) {
    super(canvas);
    this.clear();
    canvas.addEventListener("pointermove", (event) => this.choose(this.nearest(this.at(event)[0])));
    canvas.addEventListener("pointerleave", () => this.choose(-1));
    canvas.addEventListener("blur", () => this.choose(-1));
    canvas.addEventListener("keydown", (event) => this.onKey(event));
  }

  clear() {
    /** Each: seconds since the question, logical and physical entries. */
    this.points = [];
    /** Entries a cut leaves; null without a budget. */
    this.budget = null;
    this.choose(-1);
  }

  add(point) {
    this.points.push(point);
    // Long answers keep their shape at half the points.
    if (this.points.length > MAX_POINTS) this.points = this.points.filter((_, nth) => nth % 2 === 0 || nth > MAX_POINTS - 100);
    this.touch();
  }

  onKey(event) {
    const last = this.points.length - 1;
    const from = this.chosen < 0 ? last + (event.key === "ArrowLeft" ? 1 : -1) : this.chosen;
    const to = { ArrowLeft: from - 1, ArrowRight: from + 1, Home: 0, End: last }[event.key];
    if (to === undefined || last < 0) return;
    event.preventDefault();
    this.choose(clamp(to, 0, last));
  }

  nearest(x) {
    const { x: place } = this.scales();
    let best = -1;
    this.points.forEach(({ seconds }, nth) => {
      if (best < 0 || Math.abs(place(seconds) - x) < Math.abs(place(this.points[best].seconds) - x)) best = nth;
    });
    return best;
  }

  choose(nth) {
    this.chosen = nth;
    const point = this.points[nth];
    $("r-time").textContent = point
      ? `${point.seconds.toFixed(1)} s: ${number(point.physical)} of ${number(point.logical)} entries` : "";
    this.touch();
  }

  scales() {
    const { left, right, top, bottom } = MARGIN, last = this.points.at(-1);
    const span = Math.max(last?.seconds ?? 0, 2), most = Math.max(last?.logical ?? 0, this.budget ?? 0, 1) * 1.06;
    return {
      span,
      x: (seconds) => left + (seconds / span) * (this.width - left - right),
      y: (entries) => this.height - bottom - (entries / most) * (this.height - top - bottom),
    };
  }

  draw(brush) {
    const scales = this.scales(), { x, y } = scales;
    this.drawAxis(brush, scales);
    if (!this.points.length) {
      brush.fillStyle = colours.soft;
      brush.fillText("Ask something: the lines part where the cache begins to forget.", 8, this.height - MARGIN.bottom - 12);
      return;
    }
    this.drawAreas(brush, scales);
    if (this.budget) {
      brush.setLineDash([2, 4]);
      this.stroke(brush, [[MARGIN.left, y(this.budget)], [this.width - MARGIN.right, y(this.budget)]], colours.soft, 1);
      brush.setLineDash([]);
    }
    this.stroke(brush, this.path(scales, "logical"), colours.soft, 1.6);
    this.stroke(brush, this.path(scales, "physical"), colours.held, 2.4);
    this.drawEnds(brush, scales);
    const chosen = this.points[this.chosen];
    if (chosen) this.stroke(brush, [[x(chosen.seconds), 4], [x(chosen.seconds), this.height - MARGIN.bottom]], colours.mark, 1);
  }

  path({ x, y }, field) {
    return this.points.map((point) => [x(point.seconds), y(point[field])]);
  }

  stroke(brush, path, colour, width) {
    brush.strokeStyle = colour;
    brush.lineWidth = width;
    brush.lineJoin = brush.lineCap = "round";
    brush.beginPath();
    for (const [x, y] of path) brush.lineTo(x, y);
    brush.stroke();
  }

  drawAxis(brush, { x, span }) {
    const base = this.height - MARGIN.bottom, edge = this.width - MARGIN.right;
    brush.font = SMALL;
    this.stroke(brush, [[MARGIN.left, base + 0.5], [edge, base + 0.5]], colours.line, 1);
    brush.fillStyle = colours.soft;
    const every = TICKS.find((step) => span / step <= 7) ?? 3600;
    for (let tick = 0; this.points.length && tick <= span; tick += every) {
      const text = `${tick} s`, wide = brush.measureText(text).width;
      brush.fillText(text, clamp(x(tick) - wide / 2, MARGIN.left, edge - wide), this.height - 3);
    }
  }

  /** What is held, in its colour; between it and what was seen, what is forgotten. */
  drawAreas(brush, scales) {
    const base = this.height - MARGIN.bottom, held = this.path(scales, "physical"), seen = this.path(scales, "logical");
    const fill = (path, style) => {
      brush.fillStyle = style;
      brush.beginPath();
      for (const [x, y] of path) brush.lineTo(x, y);
      brush.fill();
    };
    brush.globalAlpha = 0.05;
    fill([...seen, ...held.toReversed()], colours.ink);
    brush.globalAlpha = 0.28;
    fill([...held, [held.at(-1)[0], base], [held[0][0], base]], colours.held);
    brush.globalAlpha = 1;
  }

  /** What the lines' ends stand for, beside them; pushed apart where they meet. */
  drawEnds(brush, { x, y }) {
    const last = this.points.at(-1), at = x(last.seconds) + 7;
    const ends = [
      { y: y(last.logical), text: `${compact(last.logical)} seen`, colour: colours.soft },
      { y: y(last.physical), text: `${compact(last.physical)} held`, colour: colours.ink },
    ];
    if (this.budget) ends.push({ y: y(this.budget), text: "budget", colour: colours.soft });
    ends.sort((one, other) => one.y - other.y);
    for (let nth = 1; nth < ends.length; nth++) ends[nth].y = Math.max(ends[nth].y, ends[nth - 1].y + 13);
    const over = Math.max(ends.at(-1).y - (this.height - 8), 0);
    for (const end of ends) {
      brush.fillStyle = end.colour;
      brush.fillText(end.text, at, end.y + 4 - over);
    }
    brush.fillStyle = colours.held;
    brush.beginPath();
    brush.arc(at - 7, y(last.physical), 3.5, 0, 7);
    brush.fill();
  }
}
