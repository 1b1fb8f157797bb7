// The results of a query: their grid, status line and button for more.

import { KINDS, api, byId, count, post } from "./dom.js";
import { Grid, focusCell } from "./grid.js";

export class Pane {
  constructor(index, search) {
    this.index = index;
    this.status = byId("status");
    this.results = byId("results");
    this.more = byId("more");
    this.grid = new Grid(this.results, index, search);
    this.more.addEventListener("click", () => search.showMore());
    this.collection = search.collection;
    byId("collect-shown").addEventListener("change", (event) => this.collection.set(this.hits, event.target.checked));
    document.addEventListener("collected", () => this.showCollected());
  }

  get hits() {
    return this.grid.hits;
  }

  async run(query, options, keepPlace) {
    this.running?.abort();
    const kind = query.kind ?? (query.text === undefined ? null : "text");
    const rejection = this.index.info.rejects[kind];
    if (rejection) {
      this.clear();
      this.showStatus(`This index cannot be searched by ${KINDS[kind]}: ${rejection}`);
      return;
    }
    const running = (this.running = new AbortController());
    this.results.classList.add("busy");
    const started = performance.now();
    try {
      const found = await this.send(query, options, running.signal);
      if (!running.signal.aborted) this.show(found, options, performance.now() - started, keepPlace);
    } catch (error) {
      if (error.name === "AbortError") return;
      this.clear();
      this.showStatus(error.message, true);
    } finally {
      if (this.running === running) this.results.classList.remove("busy");
    }
  }

  send(query, options, signal) {
    const { text, row, file, kind } = query;
    const { match, ...filters } = options;
    if (!file) return post("/api/search", { ...(text === undefined ? { row } : { text, match }), ...filters }, signal);
    const values = new URLSearchParams({ k: options.k });
    for (const name of ["labels", "splits", "languages"]) for (const value of options[name]) values.append(name, value);
    for (const name of ["where", "selection"]) if (options[name]) values.set(name, options[name]);
    return api(`/api/search/${kind}?${values}`, {
      method: "POST", headers: { "Content-Type": file.type || "application/octet-stream" }, body: file, signal,
    });
  }

  show(found, options, ms, keepPlace) {
    const before = this.hits.length;
    this.grid.show(found.hits);
    this.showCollected();
    this.more.hidden = this.hits.length < options.k || options.k >= this.index.info.most_hits;
    const server = `search ${found.search_ms.toFixed(1)} ms, encoder ${found.encode_ms.toFixed(1)} ms, total ${ms.toFixed(0)} ms`;
    this.showStatus(this.hits.length ? `${count(this.hits.length)} results, best first · ${server}` : "No item passes these filters");
    if (keepPlace) focusCell(this.results, before);
  }

  showCollected() {
    const size = this.hits.filter((hit) => this.collection.has(hit.row)).length;
    byId("collect-shown-label").hidden = !this.hits.length;
    byId("collect-shown").checked = size === this.hits.length;
    byId("collect-shown").indeterminate = size > 0 && size < this.hits.length;
  }

  clear() {
    this.running?.abort();
    this.grid.show([]);
    this.showCollected();
    this.results.classList.remove("busy");
    this.more.hidden = true;
    this.showStatus("");
  }

  showStatus(text, isError = false) {
    this.status.textContent = text;
    this.status.classList.toggle("error", isError);
  }
}
