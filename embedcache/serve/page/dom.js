// Creates elements and calls the API. Text is only ever set as text, because captions are untrusted.

export const byId = (id) => document.getElementById(id);

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

export async function api(path, options = {}) {
  const response = await fetch(path, { credentials: "same-origin", ...options });
  if (response.ok) return response.json();
  let reason = `${response.status} ${response.statusText}`;
  try {
    reason = (await response.json()).error ?? reason;
  } catch { /* no JSON: the status says enough */ }
  throw new Error(reason);
}

export const post = (path, body, signal) =>
  api(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal });

export const count = (number) => number.toLocaleString("en");

export function table(rows, { head = null } = {}) {
  const line = (cells, tag) => element("tr", {}, ...cells.map((cell, place) =>
    element(place === 0 ? "th" : tag, { scope: place === 0 ? (tag === "th" ? "col" : "row") : tag === "th" ? "col" : null }, cell)));
  return element("table", {},
    head ? element("thead", {}, line(head, "th")) : null,
    element("tbody", {}, ...rows.map((row) => line(row, "td"))));
}

let version = "";
export const setVersion = (value) => { version = value; };
export const imageUrl = (row, size) => `/api/images/${row}/${size}?v=${version}`;
