// The page: a chat on the left, the cache of the running answer on the right. Wires the parts to each other and to the
// elements of index.html. Everything that grows with an answer is appended, or drawn as far as it can be seen.

import { $, bytes, element, share } from "./basics.js";
import { CachePanel } from "./cache.js";
import { Chat } from "./chat.js";
import { access, getJson } from "./server.js";
import { Settings } from "./settings.js";

const POOL_EVERY_MS = 2000;
const FACTS = [
  "Rivers begin as small streams in hills and mountains.", "Rain and melting snow feed them.",
  "They carve valleys and carry sand to the sea.", "Where they slow down, they drop what they carry.",
];
const LONG_TEXT = Array.from({ length: 60 }, (_, nth) => FACTS[nth % FACTS.length])
  .toSpliced(25, 0, "The key to the boat house is under the blue stone.")
  .join(" ");
const IDEAS = [
  { title: "Tell me how rivers begin and where they end.", about: "A short question, a long answer" },
  { title: "Write a story about a lighthouse keeper who collects sounds.", about: "Watch the story's beginning fade" },
  {
    title: "Where is the key to the boat house?", about: "One fact in a long text: does it survive?",
    question: `${LONG_TEXT}\n\nWhere is the key to the boat house?`,
  },
];

const settings = new Settings();
const cache = new CachePanel();
const chat = new Chat(cache, {
  fields: () => settings.fields(), systemPrompt: () => settings.systemPrompt(), onChange: showBusy,
});
let connecting = 0;

function showBusy() {
  const isBusy = Boolean(chat.running);
  $("send").hidden = isBusy;
  $("stop").hidden = !isBusy;
  if (!isBusy) showPool();
}

async function showPool() {
  try {
    const { pool, queue, requests } = await getJson("v1/kv");
    cache.setEntryBytes(pool);
    $("pool").className = "";
    $("pool").textContent =
      `${share(pool.usage)} of ${bytes(pool.bytes)} cache used · ${requests.length} running · ${queue.requests} waiting`;
  } catch (error) {
    complain(error);
  }
}

function complain(error) {
  $("pool").className = "bad";
  $("pool").textContent = error.message;
}

/** Learn which models there are; a server that still loads them is asked again. */
async function connect() {
  clearTimeout(connecting);
  try {
    settings.setModels((await getJson("v1/models")).data);
    await showPool();
  } catch (error) {
    complain(error);
    if (!error.isDenied) connecting = setTimeout(connect, 1000 * (error.retryAfter || 2));
  }
}

// ---- the message

function fitMessage() {
  if (CSS.supports("field-sizing", "content")) return; // the style sheet does it
  $("message").style.height = "auto";
  $("message").style.height = `${$("message").scrollHeight}px`;
}

function submit() {
  const text = $("message").value;
  if (chat.running || !text.trim()) return;
  $("message").value = "";
  fitMessage();
  chat.send(text);
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
  chat.stop();
  $("message").focus();
});
$("new-chat").addEventListener("click", () => {
  chat.restart();
  showSide("chat");
  $("message").focus();
});
for (const { title, about, question } of IDEAS) {
  const button = element("button", "", title, element("small", "", about));
  button.type = "button";
  button.addEventListener("click", () => chat.send(question ?? title));
  $("ideas").append(button);
}

// ---- the key

access.onDenied = () => {
  $("key-box").open = true;
  $("key").focus();
};
$("key").value = access.key;
$("key").addEventListener("change", () => access.enter($("key").value));
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  access.enter($("key").value);
  $("key-box").open = false;
  connect();
  $("message").focus();
});

// ---- on a small screen, one side at a time

function showSide(side) {
  document.body.dataset.side = side;
  for (const tab of ["chat", "cache"]) $(`show-${tab}`).setAttribute("aria-pressed", String(tab === side));
}

for (const side of ["chat", "cache"]) $(`show-${side}`).addEventListener("click", () => showSide(side));

// ---- keys that work everywhere

document.addEventListener("keydown", (event) => {
  const open = document.querySelector("details.popover[open]");
  if (event.key === "Escape" && open) {
    open.open = false;
    open.firstElementChild.focus();
  } else if (event.key === "Escape") chat.stop();
  else if (event.key === "/" && !/^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName)) {
    event.preventDefault();
    showSide("chat");
    $("message").focus();
  }
});
document.addEventListener("pointerdown", (event) => {
  for (const open of document.querySelectorAll("details.popover[open]")) if (!open.contains(event.target)) open.open = false;
});

// For who wants to look closer from the console, and for the tests.
globalThis.trimkv = { cache, chat, settings };
setInterval(() => chat.running && !document.hidden && showPool(), POOL_EVERY_MS);
cache.clear();
showSide("chat");
connect();
