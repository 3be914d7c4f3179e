// What a person has set: model, budget, sampling, colours. Kept in this browser; knows nothing of answers.

import { $, element, number } from "./basics.js";
import { readColours } from "./view.js";

const STEPS = [
  8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 16384, 32768, 65536, 131072,
];
const SAMPLING = ["temperature", "top_p", "top_k", "repetition_penalty", "max_tokens", "seed"];
const SAVED = [...SAMPLING, "system"];
const THEMES = ["", "light", "dark"];
const STORE = "trimkv";

export class Settings {
  constructor() {
    this.saved = restore();
    this.cards = [];
    /** Budgets the slider stands for; 0 keeps everything. */
    this.budgets = [0];
    $("model").addEventListener("change", () => this.showBudgets());
    $("budget").addEventListener("input", () => {
      this.saved["budget-value"] = this.budgets[$("budget").value];
      this.showBudget();
      this.save();
    });
    for (const name of SAVED) {
      $(name).value = this.saved[name] ?? "";
      $(name).addEventListener("change", () => this.save());
      $(name).addEventListener("input", () => this.countSampling());
    }
    $("theme").addEventListener("click", () => {
      this.saved.theme = THEMES[(THEMES.indexOf(this.saved.theme ?? "") + 1) % THEMES.length];
      this.showTheme();
      this.save();
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", readColours);
    this.showTheme();
    this.countSampling();
  }

  /** A chat request's fields, besides its messages. */
  fields() {
    const fields = { model: $("model").value };
    for (const name of SAMPLING) if ($(name).value !== "") fields[name] = Number($(name).value);
    if (!$("budget").disabled) fields.kv_budget = this.budgets[$("budget").value];
    return fields;
  }

  systemPrompt() {
    return $("system").value.trim();
  }

  /** The models there are, as `GET /v1/models` describes them. */
  setModels(cards) {
    const chosen = $("model").value;
    this.cards = cards;
    $("model").replaceChildren(...cards.map(({ id }) => new Option(id, id, false, id === chosen)));
    this.showBudgets();
  }

  save() {
    for (const name of SAVED) this.saved[name] = $(name).value;
    localStorage.setItem(STORE, JSON.stringify(this.saved));
  }

  /** Budgets that the chosen model allows: from small to its whole context, then everything. */
  showBudgets() {
    const card = this.cards.find(({ id }) => id === $("model").value);
    if (!card) return;
    const most = Math.min(card.max_kv_budget ?? card.max_model_len, card.max_model_len);
    const steps = new Set(STEPS.filter((step) => step <= most && step >= (card.kv_sink_tokens || 1)));
    if (card.kv_budget) steps.add(card.kv_budget);
    this.budgets = card.has_gates ? [...steps].sort((one, other) => one - other) : [];
    if (card.allow_dense || !card.has_gates) this.budgets.push(0);
    const wanted = this.budgets.indexOf(this.saved["budget-value"] ?? card.kv_budget);
    $("budget").max = this.budgets.length - 1;
    $("budget").disabled = !card.has_gates;
    $("budget").value = wanted >= 0 ? wanted : Math.max(this.budgets.indexOf(card.kv_budget), 0);
    this.showBudget();
  }

  showBudget() {
    const budget = this.budgets[$("budget").value], many = budget ? number(budget) : "Everything";
    const words = budget ? "entries a head" : $("budget").disabled ? "(a model without gates)" : "is kept (dense)";
    $("budget").style.setProperty("--part", $("budget").value / Math.max($("budget").max, 1));
    $("budget-text").replaceChildren(element("b", "", many), ` ${words}`);
    $("budget").setAttribute("aria-valuetext", `${many} ${words}`);
  }

  /** How many of the folded fields differ from the model's own: a person should not wonder why answers are odd. */
  countSampling() {
    const count = SAVED.filter((name) => $(name).value.trim() !== "").length;
    $("sampling-count").textContent = count || "";
  }

  showTheme() {
    const theme = this.saved.theme ?? "";
    document.documentElement.style.colorScheme = theme || "light dark";
    $("theme").dataset.theme = theme || "system";
    $("theme").setAttribute("aria-label", `Colours: ${theme || "as the system"}`);
    $("theme").title = $("theme").getAttribute("aria-label");
    readColours();
  }
}

function restore() {
  try {
    return JSON.parse(localStorage.getItem(STORE)) ?? {};
  } catch {
    return {}; // written by something else on this address
  }
}
