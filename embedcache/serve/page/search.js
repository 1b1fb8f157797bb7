// Search with texts, images or items, with filters; the page's address stores the query.

import { api, byId, count, element, imageUrl, post } from "./dom.js";
import { ItemDialog, caption, focusCell, moveInGrid, showHits } from "./grid.js";

const DEFAULT_HITS = 60;
const NAMES = { split: "Split", label: "Label", language: "Language", selection: "Selection" };

export class Search {
  constructor(info, showTab) {
    this.info = info;
    this.showTab = showTab;
    this.hits = [];
    this.query = null; // { text } or { row, name, image } or { file }
    this.k = DEFAULT_HITS;
    this.grid = byId("results");
    this.itemDialog = new ItemDialog((hit) => this.searchSimilar(hit));
    this.addFilters();
    this.addInputs();
    this.addKeys();
    window.addEventListener("popstate", () => this.loadAddress());
  }

  addFilters() {
    const choices = { ...this.info.filters };
    if (this.info.selections.length) choices.selection = Object.fromEntries(this.info.selections.map((name) => [name, null]));
    this.selects = {};
    for (const [name, values] of Object.entries(choices)) {
      const select = element("select", { name, onchange: () => { this.k = DEFAULT_HITS; this.run({ saveAddress: true }); } },
        element("option", { value: "" }, "any"),
        ...Object.entries(values).map(([value, number]) =>
          element("option", { value }, number === null ? value : `${value} (${count(number)})`)));
      this.selects[name] = select;
      byId("filters").append(element("label", {}, NAMES[name], select));
    }
  }

  addInputs() {
    const takesImages = this.info.takes.includes("image");
    byId("upload").hidden = !takesImages;
    byId("drop-hint").hidden = !takesImages;
    byId("form").addEventListener("submit", (event) => {
      event.preventDefault();
      const text = byId("query").value.trim();
      if (text) this.search({ text });
    });
    byId("query").disabled = !this.info.takes.includes("text");
    byId("file").addEventListener("change", (event) => this.withFile(event.target.files[0]));
    byId("clear").addEventListener("click", () => this.clear());
    byId("more").addEventListener("click", () => {
      this.k = Math.min(2 * this.k, this.info.most_hits);
      this.run({ saveAddress: true, keepPlace: true });
    });
    if (!takesImages) return;
    document.addEventListener("paste", (event) => this.withFile(imageOf(event.clipboardData), event));
    document.addEventListener("dragover", (event) => {
      if (![...event.dataTransfer.types].includes("Files")) return;
      event.preventDefault();
      byId("drop").hidden = false;
    });
    document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) byId("drop").hidden = true; });
    document.addEventListener("drop", (event) => {
      byId("drop").hidden = true;
      event.preventDefault();
      this.withFile(imageOf(event.dataTransfer), event);
    });
  }

  addKeys() {
    this.grid.addEventListener("keydown", (event) =>
      moveInGrid(this.grid, event, { onSimilar: (hit) => this.searchSimilar(hit), hits: () => this.hits }));
    byId("query").addEventListener("keydown", (event) => {
      if (event.key === "ArrowDown" && this.hits.length) {
        event.preventDefault();
        focusCell(this.grid, 0);
      } else if (event.key === "Escape") byId("query").blur();
    });
    document.addEventListener("keydown", (event) => {
      if (event.key !== "/" || event.target.closest("input, select, textarea, dialog")) return;
      event.preventDefault();
      this.showTab("search");
      byId("query").focus();
      byId("query").select();
    });
  }

  withFile(file, event = null) {
    if (!file) return;
    event?.preventDefault();
    byId("file").value = "";
    this.showTab("search");
    if (file.size > this.info.max_upload_bytes) {
      this.showStatus(`the image has ${count(file.size)} bytes; at most ${count(this.info.max_upload_bytes)} are accepted`, true);
      return;
    }
    this.search({ file });
  }

  searchSimilar(hit) {
    this.showTab("search");
    this.search({ row: hit.row, name: caption(hit), image: hit.image });
  }

  searchText(text) {
    byId("query").value = text;
    this.showTab("search");
    this.search({ text });
  }

  search(query) {
    this.query = query;
    this.k = DEFAULT_HITS;
    if (query.text === undefined) byId("query").value = "";
    this.run({ saveAddress: true });
  }

  clear() {
    this.running?.abort();
    this.query = null;
    this.hits = [];
    byId("query").value = "";
    this.showQuery();
    showHits(this.grid, [], {});
    this.grid.classList.remove("busy");
    byId("more").hidden = true;
    byId("start").hidden = false;
    this.showStatus("");
    history.pushState(null, "", "/");
    byId("query").focus();
  }

  options() {
    const chosen = (name) => (this.selects[name]?.value ? [this.selects[name].value] : []);
    return {
      k: this.k, labels: chosen("label"), splits: chosen("split"), languages: chosen("language"),
      selection: this.selects.selection?.value || null,
    };
  }

  async run({ saveAddress = false, keepPlace = false } = {}) {
    if (!this.query) return;
    this.running?.abort();
    const running = (this.running = new AbortController());
    if (saveAddress) this.storeAddress();
    this.showQuery();
    this.grid.classList.add("busy");
    const started = performance.now();
    try {
      const found = await this.send(running.signal);
      if (running.signal.aborted) return;
      this.show(found, performance.now() - started, keepPlace);
    } catch (error) {
      if (error.name === "AbortError") return;
      this.hits = [];
      showHits(this.grid, [], {});
      byId("more").hidden = true;
      this.showStatus(error instanceof TypeError ? "the server does not respond; check that it is still running" : error.message, true);
    } finally {
      if (this.running === running) this.grid.classList.remove("busy");
    }
  }

  send(signal) {
    const { text, row, file } = this.query;
    const options = this.options();
    if (!file) return post("/api/search", row === undefined ? { text, ...options } : { row, ...options }, signal);
    const query = new URLSearchParams({ k: options.k });
    for (const name of ["labels", "splits", "languages"]) for (const value of options[name]) query.append(name, value);
    if (options.selection) query.set("selection", options.selection);
    return api(`/api/search/image?${query}`, {
      method: "POST", headers: { "Content-Type": file.type || "application/octet-stream" }, body: file, signal,
    });
  }

  show(found, ms, keepPlace) {
    const before = this.hits.length;
    this.hits = found.hits;
    showHits(this.grid, this.hits, { onOpen: (place) => this.open(place), onSimilar: (hit) => this.searchSimilar(hit) });
    byId("start").hidden = true;
    byId("more").hidden = this.hits.length < this.k || this.k >= this.info.most_hits;
    const server = `search ${found.search_ms.toFixed(1)} ms, encoder ${found.encode_ms.toFixed(1)} ms, total ${ms.toFixed(0)} ms`;
    this.showStatus(this.hits.length ? `${count(this.hits.length)} results, best first · ${server}` : "No item passes these filters");
    if (keepPlace) focusCell(this.grid, before);
    else window.scrollTo({ top: 0 });
  }

  open(place) {
    this.itemDialog.open(this.hits, place, (last) => focusCell(this.grid, last));
  }

  showQuery() {
    const { file, image, name, row } = this.query ?? {};
    byId("query-card").hidden = !file && row === undefined;
    if (this.preview) URL.revokeObjectURL(this.preview);
    this.preview = file ? URL.createObjectURL(file) : null;
    const url = this.preview ?? (image === null || image === undefined ? null : imageUrl(image, "thumbnail"));
    byId("query-image").hidden = url === null;
    if (url) byId("query-image").src = url;
    byId("query-text").textContent = file ? `Similar to your image ${file.name}` : row === undefined ? "" : `Similar to ${name}`;
  }

  showStatus(text, isError = false) {
    byId("status").textContent = text;
    byId("status").classList.toggle("error", isError);
  }

  storeAddress() {
    const query = new URLSearchParams();
    const { text, row } = this.query;
    if (text !== undefined) query.set("q", text);
    if (row !== undefined) query.set("row", row);
    for (const [name, select] of Object.entries(this.selects)) if (select.value) query.set(name, select.value);
    if (this.k !== DEFAULT_HITS) query.set("k", this.k);
    const address = `/?${query}`;
    if (address !== location.pathname + location.search) history.pushState(null, "", address);
  }

  async loadAddress() {
    const query = new URLSearchParams(location.search);
    for (const [name, select] of Object.entries(this.selects)) select.value = query.get(name) ?? "";
    this.k = Number(query.get("k")) || DEFAULT_HITS;
    byId("query").value = query.get("q") ?? "";
    if (query.has("row")) {
      try {
        const item = await api(`/api/items/${query.get("row")}`);
        const name = item.captions.slice(0, 3).map((one) => one.text).join(" · ") || item.key;
        this.query = { row: item.row, name, image: item.image };
      } catch (error) {
        this.showStatus(error.message, true);
        return;
      }
    } else this.query = query.has("q") ? { text: query.get("q") } : null;
    if (this.query) await this.run();
    else if (this.hits.length) this.clear();
  }
}

const imageOf = (data) => [...(data?.files ?? [])].find((file) => file.type.startsWith("image/"));
