// Entries of every stream: layers from left to right, heads from top to bottom.

import { $, clamp, number } from "./basics.js";
import { SMALL, View, box, colours } from "./view.js";

const LEFT = 20;
const BOTTOM = 16;
// Before anything is known: a grid to look forward to.
const NOTHING = { layers: 30, heads: 3 };

export class HeatView extends View {
  constructor(canvas, onPick) {
    super(canvas);
    this.onPick = onPick;
    this.cursor = this.picked = null;
    this.show([], 0);
    canvas.addEventListener("pointermove", (event) => this.choose(this.cellAt(event)));
    canvas.addEventListener("pointerleave", () => this.choose(null));
    canvas.addEventListener("blur", () => this.choose(null));
    canvas.addEventListener("click", (event) => this.pick(this.cellAt(event)));
    canvas.addEventListener("keydown", (event) => this.onKey(event));
  }

  /** `entries`: [L][H], of so many tokens seen. */
  show(entries, seen) {
    Object.assign(this, { entries, seen, most: 0 });
    for (const layer of entries) this.most = Math.max(this.most, ...layer);
    // Eight heads need more room than three.
    const high = entries.length ? `${clamp(entries[0].length * 15 + 18, 93, 200)}px` : "";
    if (this.canvas.style.height !== high) this.canvas.style.height = high;
    $("heat-top").textContent = this.most ? `${number(this.most)} entries` : "full";
    this.choose(this.cursor);
  }

  clear() {
    this.show(this.entries.map((layer) => layer.map(() => 0)), 0);
  }

  grid() {
    const layers = this.entries.length || NOTHING.layers, heads = this.entries[0]?.length || NOTHING.heads;
    return { layers, heads, wide: (this.width - LEFT) / layers, high: (this.height - BOTTOM) / heads };
  }

  cellAt(event) {
    const [x, y] = this.at(event), { layers, heads, wide, high } = this.grid();
    if (!this.entries.length || x < LEFT || y > high * heads) return null;
    return { layer: clamp(Math.floor((x - LEFT) / wide), 0, layers - 1), head: clamp(Math.floor(y / high), 0, heads - 1) };
  }

  choose(cell) {
    this.cursor = cell;
    const shown = cell ?? this.picked, held = shown && this.entries[shown.layer]?.[shown.head];
    $("r-heat").textContent = shown && held !== undefined
      ? `layer ${shown.layer}, head ${shown.head}: ${number(held)} of ${number(this.seen)} tokens` : "";
    this.touch();
  }

  /** Choose a head whose tokens are shown alone; the same once more, or null: all of them. */
  pick(cell) {
    const isSame = cell && this.picked && cell.layer === this.picked.layer && cell.head === this.picked.head;
    this.picked = isSame ? null : cell;
    this.choose(this.cursor);
    this.onPick(this.picked);
  }

  onKey(event) {
    if (!this.entries.length) return;
    const { layers, heads } = this.grid(), at = this.cursor ?? this.picked;
    const moves = {
      ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], Home: [-layers, 0], End: [layers, 0],
    };
    if (moves[event.key]) {
      const [across, down] = at ? moves[event.key] : [0, 0], from = at ?? { layer: 0, head: 0 };
      this.choose({ layer: clamp(from.layer + across, 0, layers - 1), head: clamp(from.head + down, 0, heads - 1) });
    } else if (event.key === "Enter" || event.key === " ") this.pick(this.cursor);
    else if (event.key === "Escape" && this.picked) this.pick(null);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  draw(brush) {
    const { layers, heads, wide, high } = this.grid(), gap = wide > 9 ? 2 : 1, radius = Math.min(3, wide / 4);
    const cell = ({ layer, head }) => [LEFT + layer * wide, head * high, wide - gap, high - gap];
    for (let layer = 0; layer < layers; layer++) {
      for (let head = 0; head < heads; head++) {
        const held = this.entries[layer]?.[head] ?? 0;
        brush.globalAlpha = 0.5;
        brush.fillStyle = colours.line;
        box(brush, cell({ layer, head }), radius);
        if (!held) continue;
        brush.globalAlpha = 0.1 + 0.9 * (held / this.most);
        brush.fillStyle = colours.held;
        box(brush, cell({ layer, head }), radius);
      }
    }
    brush.globalAlpha = 1;
    this.drawNames(brush);
    for (const [chosen, colour] of [[this.picked, colours.ink], [this.cursor, colours.mark]]) {
      if (!chosen) continue;
      const [x, y, across, down] = cell(chosen);
      brush.strokeStyle = colour;
      box(brush, [x - 0.5, y + 1, across + 1, down - 1], radius + 0.5, 2);
    }
  }

  drawNames(brush) {
    const { layers, heads, wide, high } = this.grid();
    brush.font = SMALL;
    brush.fillStyle = colours.soft;
    const every = [1, 2, 5, 10, 20].find((step) => step * wide > 26) ?? 50;
    for (let layer = 0; layer < layers; layer += every) brush.fillText(String(layer), LEFT + layer * wide + 1, this.height - 2);
    for (let head = 0; head < heads; head += high > 12 ? 1 : 2) brush.fillText(String(head), 4, head * high + high / 2 + 3);
  }
}
