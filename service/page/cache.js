// The right side: one request's cache, looked at again and again until it has ended. Owns the three views and the tiles.

import { $, bytes, number, setText, share } from "./basics.js";
import { HeatView } from "./heat-view.js";
import { getJson } from "./server.js";
import { TimeView } from "./time-view.js";
import { TokenView } from "./token-view.js";

const FASTEST_LOOK_MS = 200;
const PHASES = { waiting: "waiting", decode: "answering", ended: "ended" };

export class CachePanel {
  constructor() {
    this.timeView = new TimeView($("time"));
    this.heatView = new HeatView($("heat"), (picked) => this.onPick(picked));
    this.tokenView = new TokenView($("token-canvas"), $("tokens"), $("token-height"));
    /** Bytes of one entry, and of one in a cache that keeps all; 0 until the server has said. */
    this.entryBytes = this.denseBytes = 0;
    this.watched = null;
    $("all-streams").addEventListener("click", () => this.heatView.pick(null));
  }

  /** Nothing is watched any more, and another question may come. */
  clear() {
    this.watched = null;
    this.tokenView.clear();
    this.timeView.clear();
    this.heatView.clear();
    for (const id of ["t-seen", "t-kept", "t-bytes", "t-cuts"]) setText(id, "–");
    setText("t-dense", "memory");
    setText("show-cache", "Cache");
    this.showPhase("idle", "idle");
    $("tiles").style.setProperty("--kept", 0);
  }

  /** What one entry takes, as the server says. */
  setEntryBytes({ entry_bytes, dense_entry_bytes }) {
    this.entryBytes = entry_bytes;
    this.denseBytes = dense_entry_bytes;
    if (this.watched?.detail) this.showTiles(this.watched.detail);
  }

  /** Watch the request with this id from now on. */
  watch(id) {
    if (!id) return;
    this.watched = { id, started: performance.now(), isOver: false, detail: null };
    this.lookOn(this.watched);
  }

  /** The answer has ended: one last look shows what was left. */
  async end() {
    if (!this.watched) return;
    this.watched.isOver = true;
    await this.look(this.watched);
  }

  /** A slow server, a large answer and a page out of sight are asked less often. */
  async lookOn(watched) {
    while (this.watched === watched && !watched.isOver) {
      const asked = performance.now();
      await this.look(watched);
      const pause = Math.max(FASTEST_LOOK_MS, 2 * (performance.now() - asked)) * (document.hidden ? 5 : 1);
      await new Promise((resume) => setTimeout(resume, pause));
    }
  }

  async look(watched) {
    const { picked } = this.heatView;
    const query = picked ? `?layer=${picked.layer}&head=${picked.head}` : "";
    try {
      const detail = await getJson(`v1/kv/${encodeURIComponent(watched.id)}${query}`);
      if (this.watched === watched) this.show(detail, picked);
    } catch (error) {
      // Anything else, as a server that is busy, may be over at the next look.
      if (error.status === 404 && this.watched === watched) this.lose(watched);
    }
  }

  /** The server knows no more of it: a minute has passed. What was shown last stays. */
  lose(watched) {
    watched.isOver = watched.isLost = true;
    if (this.heatView.picked) this.heatView.pick(null);
    setText("r-tokens", "the server has let this cache go: ask again");
  }

  onPick(picked) {
    const watched = this.watched;
    if (picked && watched?.isLost) {
      this.lose(watched);
      return;
    }
    setText("tokens-title", picked ? `Tokens of layer ${picked.layer}, head ${picked.head}` : "Tokens");
    setText("tokens-most", picked ? "held" : "in all streams");
    $("all-streams").hidden = !picked;
    if (!watched) return;
    if (!watched.isLost) this.look(watched);
    else if (watched.detail) this.showTokens(watched.detail, null);
  }

  show(detail, picked) {
    const watched = this.watched, { points } = this.timeView;
    watched.detail = detail;
    // The picture of an ended request may be the one before it: the line does not go back.
    const isNew = detail.phase !== "waiting" && !(detail.phase === "ended" && points.at(-1)?.logical >= detail.entries_logical);
    if (isNew) {
      const seconds = (performance.now() - watched.started) / 1000 - detail.age_seconds;
      this.timeView.budget = detail.budget.kv_budget ? detail.budget.kv_budget * detail.num_layers * detail.num_heads : null;
      this.timeView.add({
        seconds: Math.max(seconds, points.at(-1)?.seconds ?? 0), logical: detail.entries_logical, physical: detail.entries_physical,
      });
    }
    this.heatView.show(detail.head_entries, detail.seen_tokens);
    if (!this.tokenView.prompt && detail.prompt_tokens) this.tokenView.setPrompt(null, detail.prompt_tokens);
    if (same(picked, this.heatView.picked)) this.showTokens(detail, picked);
    this.showTiles(detail);
  }

  showTokens(detail, picked) {
    if (!picked || !detail.positions) {
      this.tokenView.show(detail.token_streams, detail.num_layers * detail.num_heads, detail.seen_tokens);
      return;
    }
    const holders = new Uint8Array(detail.seen_tokens);
    for (const position of detail.positions[0].positions) holders[position] = 1;
    this.tokenView.show(holders, 1, detail.seen_tokens);
  }

  showTiles(detail) {
    const { entries_physical: held, entries_logical: seen } = detail;
    const read = Math.round(Math.min(detail.seen_tokens / detail.prompt_tokens, 1) * 100);
    this.showPhase(detail.phase, PHASES[detail.phase] ?? `reading ${read} %`);
    setText("t-seen", number(detail.seen_tokens));
    setText("t-kept", seen ? share(held / seen) : "–");
    setText("t-bytes", this.entryBytes ? bytes(held * this.entryBytes) : number(held));
    setText("t-dense", this.entryBytes && seen ? `instead of ${bytes(seen * this.denseBytes)}` : "memory");
    setText("t-cuts", number(detail.evictions));
    setText("show-cache", seen ? `Cache ${share(held / seen)}` : "Cache");
    $("tiles").style.setProperty("--kept", seen ? held / seen : 0);
  }

  showPhase(phase, text) {
    $("tiles").dataset.phase = phase;
    setText("t-phase", text);
  }
}

function same(one, other) {
  return one?.layer === other?.layer && one?.head === other?.head;
}
