// Asking with words, pictures or items, with filters; the address of the page says what was asked.

import { api, byId, count, element, pictureUrl, post } from "./dom.js";
import { Opened, caption, focusCell, moveInGrid, showHits } from "./grid.js";

const FIRST = 60;
const NAMES = { split: "Split", label: "Label", language: "Language", selection: "Selection" };

export class Search {
  constructor(info, showTab) {
    this.info = info;
    this.showTab = showTab;
    this.hits = [];
    this.question = null; // { text } or { row, name, image } or { file }
    this.k = FIRST;
    this.grid = byId("results");
    this.opened = new Opened((hit) => this.like(hit));
    this.addFilters();
    this.addAsking();
    this.addKeys();
    window.addEventListener("popstate", () => this.fromAddress());
  }

  addFilters() {
    const choices = { ...this.info.filters };
    if (this.info.selections.length) choices.selection = Object.fromEntries(this.info.selections.map((name) => [name, null]));
    this.selects = {};
    for (const [name, values] of Object.entries(choices)) {
      const select = element("select", { name, onchange: () => { this.k = FIRST; this.ask({ saves: true }); } },
        element("option", { value: "" }, "any"),
        ...Object.entries(values).map(([value, number]) =>
          element("option", { value }, number === null ? value : `${value} (${count(number)})`)));
      this.selects[name] = select;
      byId("filters").append(element("label", {}, NAMES[name], select));
    }
  }

  addAsking() {
    const takesImages = this.info.takes.includes("image");
    byId("upload").hidden = !takesImages;
    byId("drop-hint").hidden = !takesImages;
    byId("form").addEventListener("submit", (event) => {
      event.preventDefault();
      const text = byId("query").value.trim();
      if (text) this.start({ text });
    });
    byId("query").disabled = !this.info.takes.includes("text");
    byId("file").addEventListener("change", (event) => this.withFile(event.target.files[0]));
    byId("clear").addEventListener("click", () => this.clear());
    byId("more").addEventListener("click", () => {
      this.k = Math.min(2 * this.k, this.info.most_hits);
      this.ask({ saves: true, keepsPlace: true });
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
      moveInGrid(this.grid, event, { onLike: (hit) => this.like(hit), hits: () => this.hits }));
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
      this.say(`the picture has ${count(file.size)} bytes; at most ${count(this.info.max_upload_bytes)} are taken`, true);
      return;
    }
    this.start({ file });
  }

  like(hit) {
    this.showTab("search");
    this.start({ row: hit.row, name: caption(hit), image: hit.image });
  }

  about(text) {
    byId("query").value = text;
    this.showTab("search");
    this.start({ text });
  }

  start(question) {
    this.question = question;
    this.k = FIRST;
    if (question.text === undefined) byId("query").value = "";
    this.ask({ saves: true });
  }

  clear() {
    this.running?.abort();
    this.question = null;
    this.hits = [];
    byId("query").value = "";
    this.showAsked();
    showHits(this.grid, [], {});
    this.grid.classList.remove("busy");
    byId("more").hidden = true;
    byId("start").hidden = false;
    this.say("");
    history.pushState(null, "", "/");
    byId("query").focus();
  }

  wishes() {
    const chosen = (name) => (this.selects[name]?.value ? [this.selects[name].value] : []);
    return {
      k: this.k, labels: chosen("label"), splits: chosen("split"), languages: chosen("language"),
      selection: this.selects.selection?.value || null,
    };
  }

  async ask({ saves = false, keepsPlace = false } = {}) {
    if (!this.question) return;
    this.running?.abort();
    const running = (this.running = new AbortController());
    if (saves) this.toAddress();
    this.showAsked();
    this.grid.classList.add("busy");
    const started = performance.now();
    try {
      const found = await this.send(running.signal);
      if (running.signal.aborted) return;
      this.show(found, performance.now() - started, keepsPlace);
    } catch (error) {
      if (error.name === "AbortError") return;
      this.hits = [];
      showHits(this.grid, [], {});
      byId("more").hidden = true;
      this.say(error instanceof TypeError ? "the server does not answer; is it still running?" : error.message, true);
    } finally {
      if (this.running === running) this.grid.classList.remove("busy");
    }
  }

  send(signal) {
    const { text, row, file } = this.question;
    const wishes = this.wishes();
    if (!file) return post("/api/search", row === undefined ? { text, ...wishes } : { row, ...wishes }, signal);
    const query = new URLSearchParams({ k: wishes.k });
    for (const name of ["labels", "splits", "languages"]) for (const value of wishes[name]) query.append(name, value);
    if (wishes.selection) query.set("selection", wishes.selection);
    return api(`/api/search/image?${query}`, {
      method: "POST", headers: { "Content-Type": file.type || "application/octet-stream" }, body: file, signal,
    });
  }

  show(found, ms, keepsPlace) {
    const before = this.hits.length;
    this.hits = found.hits;
    showHits(this.grid, this.hits, { onOpen: (place) => this.open(place), onLike: (hit) => this.like(hit) });
    byId("start").hidden = true;
    byId("more").hidden = this.hits.length < this.k || this.k >= this.info.most_hits;
    const server = `search ${found.search_ms.toFixed(1)} ms, encoder ${found.encode_ms.toFixed(1)} ms, all ${ms.toFixed(0)} ms`;
    this.say(this.hits.length ? `${count(this.hits.length)} results, best first · ${server}` : "Nothing passes these filters");
    if (keepsPlace) focusCell(this.grid, before);
    else window.scrollTo({ top: 0 });
  }

  open(place) {
    this.opened.open(this.hits, place, (last) => focusCell(this.grid, last));
  }

  showAsked() {
    const { file, image, name, row } = this.question ?? {};
    byId("asked").hidden = !file && row === undefined;
    if (this.preview) URL.revokeObjectURL(this.preview);
    this.preview = file ? URL.createObjectURL(file) : null;
    const url = this.preview ?? (image === null || image === undefined ? null : pictureUrl(image, "thumbnail"));
    byId("asked-picture").hidden = url === null;
    if (url) byId("asked-picture").src = url;
    byId("asked-text").textContent = file ? `Like your picture ${file.name}` : row === undefined ? "" : `Like ${name}`;
  }

  say(text, isError = false) {
    byId("status").textContent = text;
    byId("status").classList.toggle("error", isError);
  }

  toAddress() {
    const query = new URLSearchParams();
    const { text, row } = this.question;
    if (text !== undefined) query.set("q", text);
    if (row !== undefined) query.set("row", row);
    for (const [name, select] of Object.entries(this.selects)) if (select.value) query.set(name, select.value);
    if (this.k !== FIRST) query.set("k", this.k);
    const address = `/?${query}`;
    if (address !== location.pathname + location.search) history.pushState(null, "", address);
  }

  async fromAddress() {
    const query = new URLSearchParams(location.search);
    for (const [name, select] of Object.entries(this.selects)) select.value = query.get(name) ?? "";
    this.k = Number(query.get("k")) || FIRST;
    byId("query").value = query.get("q") ?? "";
    if (query.has("row")) {
      try {
        const item = await api(`/api/items/${query.get("row")}`);
        const name = item.captions.slice(0, 3).map((one) => one.text).join(" · ") || item.key;
        this.question = { row: item.row, name, image: item.image };
      } catch (error) {
        this.say(error.message, true);
        return;
      }
    } else this.question = query.has("q") ? { text: query.get("q") } : null;
    if (this.question) await this.ask();
    else if (this.hits.length) this.clear();
  }
}

const imageOf = (data) => [...(data?.files ?? [])].find((file) => file.type.startsWith("image/"));
