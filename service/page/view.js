// Canvases that draw themselves when something has changed, once a frame at most. Knows no cache.

export const TEXT = '13px Inter, system-ui, -apple-system, "Segoe UI", "Noto Sans", "DejaVu Sans", sans-serif';
export const SMALL = '11px Inter, system-ui, -apple-system, "Segoe UI", "Noto Sans", "DejaVu Sans", sans-serif';
/** The style sheet's colours, for brushes. */
export const colours = {};

const NAMES = ["ink", "soft", "line", "card", "held", "onheld", "mark"];
const views = [];
let isFrameAsked = false;

/** To be called when the colours have changed. */
export function readColours() {
  const style = getComputedStyle(document.documentElement);
  for (const name of NAMES) colours[name] = style.getPropertyValue(`--${name}`);
  for (const view of views) view.touch();
}

function drawAll(now) {
  isFrameAsked = false;
  for (const view of views) {
    if (!view.isDirty || !view.width) continue;
    view.isDirty = false;
    view.brush.clearRect(0, 0, view.width, view.height);
    view.draw(view.brush, now);
  }
}

export class View {
  constructor(canvas) {
    this.canvas = canvas;
    this.brush = canvas.getContext("2d");
    this.width = this.height = 0;
    this.isDirty = false;
    views.push(this);
    new ResizeObserver(() => this.resize()).observe(canvas);
  }

  /** Sharp on every screen. */
  resize() {
    const scale = devicePixelRatio || 1;
    this.width = this.canvas.clientWidth;
    this.height = this.canvas.clientHeight;
    this.canvas.width = Math.round(this.width * scale);
    this.canvas.height = Math.round(this.height * scale);
    this.brush.setTransform(scale, 0, 0, scale, 0, 0);
    this.touch();
  }

  /** Ask to be drawn in the next frame. */
  touch() {
    this.isDirty = true;
    if (isFrameAsked) return;
    isFrameAsked = true;
    requestAnimationFrame(drawAll);
  }

  /** The place of a pointer within the canvas. */
  at(event) {
    const box = this.canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  }
}

/** A rectangle with round corners, filled or, with `line`, drawn. */
export function box(brush, [x, y, wide, high], radius, line = 0) {
  brush.beginPath();
  brush.roundRect(x, y, wide, high, radius);
  if (!line) return brush.fill();
  brush.lineWidth = line;
  return brush.stroke();
}
