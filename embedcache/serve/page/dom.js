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
  const response = await send(path, options);
  return response.json();
}

export async function send(path, options = {}) {
  const response = await fetch(path, { credentials: "same-origin", ...options }).catch((error) => {
    throw error.name === "AbortError" ? error : new Error("the server does not respond; check that it is still running");
  });
  if (response.ok) return response;
  let reason = `${response.status} ${response.statusText}`;
  try {
    reason = (await response.json()).error ?? reason;
  } catch { /* no JSON: the status says enough */ }
  throw new Error(reason);
}

export const post = (path, body, signal) =>
  api(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal });

export const failure = (error) => element("p", { class: "warning", role: "alert" }, error.message);

export const count = (number) => number.toLocaleString("en");

export const pause = (ms) => new Promise((resolve) => { setTimeout(resolve, ms); });

export function table(rows, { head = null } = {}) {
  const line = (cells, tag) => element("tr", {}, ...cells.map((cell, place) =>
    element(place === 0 && cell ? "th" : tag === "th" && cell ? "th" : "td",
      { scope: !cell ? null : tag === "th" ? "col" : place === 0 ? "row" : null }, cell)));
  return element("table", {},
    head ? element("thead", {}, line(head, "th")) : null,
    element("tbody", {}, ...rows.map((row) => line(row, "td"))));
}

export const NOUNS = { image: "images", text: "texts", audio: "recordings", video: "videos", points: "point clouds" };
export const KINDS = { text: "text", image: "an image", audio: "a recording", video: "a video", points: "a point cloud" };

export class Index {
  // What the server's index holds, and the addresses of its media.
  constructor(info) {
    this.info = info;
  }

  static async open() {
    return new Index(await api("/api/info"));
  }

  media(modality, row, part) {
    return `/api/${NOUNS[modality]}/${row}/${part}?v=${this.info.version}`;
  }

  image({ image, player }, size) {
    // The image of a hit, or that of what it plays: a spectrogram or a frame; null if there is none.
    if (image !== null) return this.media("image", image, size);
    return player === null ? null : this.media(player.modality, player.row, size);
  }

}

export async function ready(path) {
  // Waits while the server computes its map.
  for (;;) {
    const found = await api(path);
    if (found.state !== "computing") return found;
    await pause(700);
  }
}
