// What every part of the page needs: elements by id, and numbers as people read them.

export const $ = (id) => document.getElementById(id);
export const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

export const number = (value) => Math.round(value).toLocaleString("en");

export function compact(value) {
  if (value < 10_000) return number(value);
  return value < 999_500 ? `${(value / 1000).toFixed(value < 99_950 ? 1 : 0)} k` : `${(value / 1e6).toFixed(1)} M`;
}

/** A part of 1 in percent; small ones with a decimal, and nothing is 0 % but nothing. */
export function share(part) {
  if (part === 0 || part >= 0.0995) return `${Math.round(part * 100)} %`;
  return part < 0.0005 ? "< 0.1 %" : `${(part * 100).toFixed(1)} %`;
}

export function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  for (; count >= 1024 && unit < units.length - 1; unit++) count /= 1024;
  return `${unit && count < 100 ? count.toFixed(1) : Math.round(count)} ${units[unit]}`;
}

export function setText(id, text) {
  if ($(id).textContent !== text) $(id).textContent = text;
}

/** An element with a class and children, which are nodes or texts. */
export function element(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children);
  return node;
}
