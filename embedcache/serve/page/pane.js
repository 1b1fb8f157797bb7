// The results of one index: their grid, status line and button for more. Two of them are compared side by side.

import { api, byId, count, element, post } from "./dom.js";
import { Grid, cells, focusCell } from "./grid.js";

export class Pane {
  constructor(index, search, parts) {
    this.index = index;
    this.search = search;
    this.parts = parts;
    this.grid = new Grid(parts.results, index, search);
    parts.more.addEventListener("click", () => search.showMore());
  }

  static first(index, search) {
    return new Pane(index, search, { status: byId("status"), results: byId("results"), more: byId("more") });
  }

  static beside(first, index, search) {
    const parts = {
      status: element("p", { class: "status", role: "status", "aria-live": "polite" }),
      results: element("ul", { class: "grid", tabindex: -1 }),
      more: element("button", { type: "button", hidden: true }, "More results"),
    };
    byId("panes").append(element("div", { class: "pane" }, parts.status, parts.results, element("p", { class: "center" }, parts.more)));
    byId("panes").classList.add("compared");
    const second = new Pane(index, search, parts);
    for (const pane of [first, second]) pane.addTitle();
    return second;
  }

  addTitle() {
    const { name, run, feature } = this.index.info;
    const about = run === null ? feature : `run ${run}, ${feature}`;
    const label = "AB"[this.index.number];
    this.parts.results.setAttribute("aria-label", `Results of ${label}, ${name}`);
    this.parts.results.parentElement.prepend(
      element("h2", { class: "pane-title" }, element("span", { class: "letter" }, label), ` ${name} `, element("small", {}, about)));
  }

  get hits() {
    return this.grid.hits;
  }

  async run(query, options, keepPlace) {
    this.running?.abort();
    const kind = query.file ? "image" : query.text === undefined ? null : "text";
    const rejection = this.index.info.rejects[kind];
    if (rejection) {
      this.clear();
      this.showStatus(`This index cannot be searched by ${kind}: ${rejection}`);
      return;
    }
    const running = (this.running = new AbortController());
    this.parts.results.classList.add("busy");
    const started = performance.now();
    try {
      const found = await this.send(query, options, running.signal);
      if (!running.signal.aborted) this.show(found, options, performance.now() - started, keepPlace);
    } catch (error) {
      if (error.name === "AbortError") return;
      this.clear();
      this.showStatus(error.message, true);
    } finally {
      if (this.running === running) this.parts.results.classList.remove("busy");
    }
  }

  send(query, options, signal) {
    const { text, file } = query;
    const index = this.index.number;
    if (!file) return post("/api/search", { ...(text === undefined ? this.item(query) : { text }), ...options, index }, signal);
    const values = new URLSearchParams({ k: options.k });
    for (const name of ["labels", "splits", "languages"]) for (const value of options[name]) values.append(name, value);
    if (options.selection) values.set("selection", options.selection);
    return api(this.index.url(`/api/search/image?${values}`), {
      method: "POST", headers: { "Content-Type": file.type || "application/octet-stream" }, body: file, signal,
    });
  }

  item({ row, key, index }) {
    // Rows are the same in an index of the same rows; any other may have the sample under its key.
    const { version, modality } = index.info;
    const isSame = version === this.index.info.version && modality === this.index.info.modality;
    return isSame ? { row } : { key };
  }

  show(found, options, ms, keepPlace) {
    const before = this.hits.length;
    this.grid.show(found.hits);
    this.parts.more.hidden = this.hits.length < options.k || options.k >= this.index.info.most_hits;
    const server = `search ${found.search_ms.toFixed(1)} ms, encoder ${found.encode_ms.toFixed(1)} ms, total ${ms.toFixed(0)} ms`;
    this.showStatus(this.hits.length ? `${count(this.hits.length)} results, best first · ${server}` : "No item passes these filters");
    if (keepPlace && this.index.number === 0) focusCell(this.parts.results, before);
  }

  clear() {
    this.running?.abort();
    this.grid.show([]);
    this.parts.results.classList.remove("busy");
    this.parts.more.hidden = true;
    this.showStatus("");
  }

  showStatus(text, isError = false) {
    this.parts.status.textContent = text;
    this.parts.status.classList.toggle("error", isError);
  }
}

export function compare(first, second) {
  // Marks each hit with its place in the other pane; returns how many of the first ten are in both.
  const places = [first, second].map((pane) => new Map(pane.hits.map((hit, place) => [hit.key, place])));
  for (const [number, pane] of [first, second].entries()) {
    const letter = "BA"[number];
    for (const cell of cells(pane.parts.results)) {
      const place = places[1 - number].get(cell.dataset.key);
      const text = place === undefined ? `not in ${letter}` : `${letter} #${place + 1}`;
      cell.querySelector(".place")?.remove();
      cell.querySelector(".details").append(element("span", { class: place === undefined ? "place alone" : "place" }, text));
      cell.setAttribute("aria-label", `${cell.getAttribute("aria-label")}, ${text}`);
    }
  }
  return [...places[0]].filter(([key, place]) => place < 10 && (places[1].get(key) ?? 10) < 10).length;
}
