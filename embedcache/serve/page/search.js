// Search with texts, images or items, with filters; the page's address stores the query and the tab.

import { Collection } from "./collect.js";
import { KINDS, api, byId, count, element, ready } from "./dom.js";
import { Grid, ItemDialog, caption, focusCell } from "./grid.js";
import { Pane } from "./pane.js";

const DEFAULT_HITS = 60;
const NAMES = { split: "Split", label: "Label", language: "Language", selection: "Selection", match: "Match" };
const ONE = { image: "image", audio: "recording", video: "video", points: "point cloud" };
const SUFFIXES = {
  image: [".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"],
  video: [".mp4", ".mkv", ".webm", ".avi", ".mov"],
  audio: [".wav", ".flac", ".mp3", ".ogg", ".m4a", ".opus"],
  points: [".npz"],
};

export class Search {
  constructor(index, showTab) {
    this.index = index;
    this.info = index.info;
    this.showTab = showTab;
    this.view = "search"; // the tab that is shown
    this.query = null; // { text } or { row, name, image } or { file, kind }
    this.k = DEFAULT_HITS;
    this.collection = new Collection(index);
    this.itemDialog = new ItemDialog(index, this.collection, (hit) => this.searchSimilar(hit));
    this.pane = new Pane(index, this);
    this.sample = new Grid(byId("sample"), index, this);
    this.addFilters();
    this.addInputs();
    this.addKeys();
    window.addEventListener("popstate", () => this.loadAddress());
  }

  takes(kind) {
    return this.info.takes.includes(kind);
  }

  addFilters() {
    const choices = { ...this.info.filters };
    if (this.info.selections.length) choices.selection = Object.fromEntries(this.info.selections.map((name) => [name, null]));
    if (this.info.matches.includes("both")) choices.match = { words: null, both: null };
    this.selects = {};
    for (const [name, values] of Object.entries(choices)) {
      const select = element("select", { name, onchange: () => { this.k = DEFAULT_HITS; this.run({ saveAddress: true }); } },
        element("option", { value: "" }, name === "match" ? "meaning" : "any"),
        ...Object.entries(values).map(([value, number]) =>
          element("option", { value }, number === null ? value : `${value} (${count(number)})`)));
      this.selects[name] = select;
      byId("filters").append(element("label", {}, NAMES[name], select));
    }
    const where = element("input", {
      name: "where", maxlength: 2000, spellcheck: "false", autocomplete: "off", placeholder: "year > 2020 and license = 'MIT'",
      title: `Columns: ${this.info.columns.join(", ")}`, onchange: () => { this.k = DEFAULT_HITS; this.run({ saveAddress: true }); },
    });
    this.selects.where = where;
    byId("filters").append(element("label", {}, "Where", where));
  }

  addInputs() {
    byId("play-hint").hidden = !this.info.has_players;
    const kinds = Object.keys(SUFFIXES).filter((kind) => this.takes(kind));
    byId("upload").hidden = !kinds.length;
    byId("upload-name").textContent = kinds.length === 1 ? `${capitalized(ONE[kinds[0]])}…` : "File…";
    byId("file").accept = kinds.flatMap((kind) => [...SUFFIXES[kind], ...(kind === "points" ? [] : [`${kind}/*`])]).join();
    byId("drop-hint").hidden = !kinds.length;
    byId("drop-hint").textContent = `Drop or paste ${kinds.map((kind) => KINDS[kind]).join(" or ")} anywhere to search with it.`;
    byId("form").addEventListener("submit", (event) => {
      event.preventDefault();
      const text = byId("query").value.trim();
      if (text) this.search({ text });
    });
    for (const id of ["query", "submit"]) byId(id).hidden = !this.takes("text");
    this.explainRejections();
    byId("file").addEventListener("change", (event) => this.withFile(event.target.files[0]));
    byId("clear").addEventListener("click", () => this.clear());
    if (!kinds.length) return;
    document.addEventListener("paste", (event) => this.withFile(fileOf(event.clipboardData), event));
    document.addEventListener("dragover", (event) => {
      if (![...event.dataTransfer.types].includes("Files")) return;
      event.preventDefault();
      byId("drop").hidden = false;
    });
    document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) byId("drop").hidden = true; });
    document.addEventListener("drop", (event) => {
      byId("drop").hidden = true;
      event.preventDefault();
      this.withFile(fileOf(event.dataTransfer), event);
    });
  }

  explainRejections() {
    // Of files, only those are missed that the index holds.
    const lines = Object.entries(this.info.rejects)
      .filter(([kind]) => kind === "text" || kind === this.info.modality)
      .map(([kind, reason]) => element("p", {}, element("strong", {}, `This index cannot be searched by ${KINDS[kind]}: `), reason));
    byId("rejections").replaceChildren(...lines);
    byId("rejections").hidden = !lines.length;
  }

  addKeys() {
    byId("query").addEventListener("keydown", (event) => {
      const shown = this.query ? this.pane.grid : this.sample;
      if (event.key === "ArrowDown" && shown.hits.length) {
        event.preventDefault();
        focusCell(shown.list, 0);
      } else if (event.key === "Escape") byId("query").blur();
    });
    document.addEventListener("keydown", (event) => {
      if (event.key !== "/" || event.target.closest("input:not([type=checkbox]), select, textarea, dialog") || !this.takes("text")) return;
      event.preventDefault();
      this.showTab("search");
      byId("query").focus();
      byId("query").select();
    });
  }

  async open() {
    // Shows a sample of the index and example questions, once the server has its map.
    byId("sample-status").textContent = "Choosing a sample…";
    try {
      const { hits, questions, reason } = await ready("/api/opening");
      this.sample.show(hits);
      byId("sample-title").hidden = !hits.length;
      byId("sample-status").textContent = reason;
      byId("questions").hidden = !questions.length || !this.takes("text");
      byId("questions").append(...questions.map((text) =>
        element("button", { type: "button", onclick: () => this.searchText(text) }, text)));
    } catch (error) {
      byId("sample-status").textContent = error.message;
    }
  }

  withFile(file, event = null) {
    if (!file) return;
    event?.preventDefault();
    byId("file").value = "";
    this.showTab("search");
    if (file.size > this.info.max_upload_bytes) {
      byId("panes").hidden = false;
      this.pane.showStatus(`the file has ${count(file.size)} bytes; at most ${count(this.info.max_upload_bytes)} are accepted`, true);
      return;
    }
    const kind = kindOf(file) ?? "image";
    // The sound of a video is a recording.
    this.search({ file, kind: kind === "video" && !this.takes("video") && this.takes("audio") ? "audio" : kind });
  }

  searchSimilar(hit) {
    this.showTab("search");
    this.search(this.similarTo(hit));
  }

  similarTo(hit) {
    return { row: hit.row, name: caption(hit), image: this.index.image(hit, "thumbnail") };
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

  showMore() {
    this.k = Math.min(2 * this.k, this.info.most_hits);
    this.run({ saveAddress: true, keepPlace: true });
  }

  clear() {
    this.showStart();
    history.pushState(null, "", "/");
    byId("query").focus();
  }

  showStart() {
    this.query = null;
    byId("query").value = "";
    this.showQuery();
    this.pane.clear();
    byId("start").hidden = false;
    byId("panes").hidden = true;
  }

  options() {
    const chosen = (name) => (this.selects[name]?.value ? [this.selects[name].value] : []);
    return {
      k: this.k, labels: chosen("label"), splits: chosen("split"), languages: chosen("language"),
      match: this.selects.match?.value || "vectors", where: this.selects.where.value.trim() || null, selection: this.selects.selection?.value || null,
    };
  }

  async run({ saveAddress = false, keepPlace = false } = {}) {
    const query = this.query;
    if (!query) return;
    if (saveAddress) this.storeAddress();
    this.showQuery();
    byId("start").hidden = true;
    byId("panes").hidden = false;
    if (!keepPlace) window.scrollTo({ top: 0 });
    await this.pane.run(query, this.options(), keepPlace);
  }

  showQuery() {
    const { file, kind, image, name, row } = this.query ?? {};
    byId("query-card").hidden = !file && row === undefined;
    if (this.preview) URL.revokeObjectURL(this.preview);
    this.preview = kind === "image" ? URL.createObjectURL(file) : null;
    const url = this.preview ?? image ?? null;
    byId("query-image").hidden = url === null;
    if (url) byId("query-image").src = url;
    byId("query-text").textContent = file ? `Similar to your ${ONE[kind]} ${file.name}` : row === undefined ? "" : `Similar to ${name}`;
  }

  storeAddress() {
    const query = new URLSearchParams();
    const { text, row } = this.query ?? {};
    if (this.view !== "search") query.set("tab", this.view);
    if (text !== undefined) query.set("q", text);
    if (row !== undefined) query.set("row", row);
    for (const [name, select] of Object.entries(this.selects)) if (select.value) query.set(name, select.value);
    if (this.k !== DEFAULT_HITS) query.set("k", this.k);
    const address = [...query].length ? `/?${query}` : "/";
    if (address !== location.pathname + location.search) history.pushState(null, "", address);
  }

  async loadAddress() {
    const query = new URLSearchParams(location.search);
    this.showTab(query.get("tab") ?? "search");
    for (const [name, select] of Object.entries(this.selects)) select.value = query.get(name) ?? "";
    this.k = Number(query.get("k")) || DEFAULT_HITS;
    byId("query").value = query.get("q") ?? "";
    if (query.has("row")) {
      const address = location.search;
      const found = await api(`/api/items?rows=${encodeURIComponent(query.get("row"))}`).catch((error) => error);
      if (location.search !== address) return; // meanwhile the page has gone on
      if (found instanceof Error) {
        this.showStart();
        byId("panes").hidden = false;
        this.pane.showStatus(found.message, true);
        return;
      }
      const [hit] = found;
      this.query = this.similarTo(hit);
    } else this.query = query.has("q") ? { text: query.get("q") } : null;
    if (this.query) await this.run();
    else if (!byId("panes").hidden) this.showStart();
  }
}

const capitalized = (word) => word[0].toUpperCase() + word.slice(1);

function kindOf(file) {
  // By the suffix, as the command does; what is pasted may have a type only.
  const name = file.name.toLowerCase();
  return Object.keys(SUFFIXES).find((kind) => SUFFIXES[kind].some((suffix) => name.endsWith(suffix)))
    ?? ["image", "audio", "video"].find((kind) => file.type.startsWith(`${kind}/`)) ?? null;
}

const fileOf = (data) => [...(data?.files ?? [])].find((file) => kindOf(file) !== null);
