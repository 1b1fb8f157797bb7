// The items that a visitor collects: a set of rows that lasts as long as the page, shown in a bar below every view.

import { api, byId, count, element, send } from "./dom.js";
import { caption } from "./grid.js";

const MAX_SHOWN = 100; // of the panel
const MAX_HITS = 2000; // kept, to show them again

export class Collection {
  constructor(index) {
    this.index = index;
    this.rows = new Set(); // in the order in which they were collected
    this.before = null; // the rows before the last change, for Undo
    this.hits = new Map(); // row -> hit
    const { collect } = index.info;
    byId("collected-save").hidden = collect === null;
    byId("collected-save").textContent = `Save as ${collect}`;
    byId("collected-show").addEventListener("click", () => this.showPanel(byId("collected-panel").hidden));
    byId("collected-clear").addEventListener("click", () => this.change(new Set()));
    byId("collected-undo").addEventListener("click", () => this.change(this.before));
    byId("collected-download").addEventListener("click", () => this.with(() => this.download()));
    byId("collected-save").addEventListener("click", () => this.with(() => this.save()));
  }

  has(row) {
    return this.rows.has(row);
  }

  set(hits, isCollected) {
    // Collects hits, or removes them.
    if (this.hits.size > MAX_HITS) this.hits.clear();
    for (const hit of hits) this.hits.set(hit.row, hit);
    this.setRows(hits.map((hit) => hit.row), isCollected);
  }

  setRows(rows, isCollected) {
    const next = new Set(this.rows);
    for (const row of rows) if (isCollected) next.add(row); else next.delete(row);
    const most = this.index.info.most_collected;
    if (next.size > most) this.note(`These would be ${count(next.size)} items; at most ${count(most)} can be collected.`, true);
    else this.change(next);
  }

  toggle(hit) {
    this.set([hit], !this.has(hit.row));
  }

  change(rows) {
    [this.before, this.rows] = [this.rows, rows];
    this.note("");
    const isEmpty = rows.size === 0;
    byId("collected").hidden = false; // also of none, because Undo brings the last ones back
    byId("collected-count").textContent = `${count(rows.size)} collected`;
    for (const name of ["show", "clear", "download", "save"]) byId(`collected-${name}`).disabled = isEmpty;
    for (const box of document.querySelectorAll(".tick input")) box.checked = this.has(Number(box.dataset.row));
    document.dispatchEvent(new Event("collected"));
    this.showPanel(!isEmpty && !byId("collected-panel").hidden);
  }

  note(text, isError = false) {
    byId("collected").hidden = byId("collected").hidden && !text;
    byId("collected-note").textContent = text;
    byId("collected-note").classList.toggle("error", isError);
  }

  async showPanel(isShown) {
    byId("collected-panel").hidden = !isShown;
    byId("collected-show").setAttribute("aria-expanded", String(isShown));
    byId("collected-show").textContent = isShown ? "Hide" : "Show";
    if (!isShown) return;
    const all = this.rows;
    const rows = [...all].slice(-MAX_SHOWN).reverse();
    const unknown = rows.filter((row) => !this.hits.has(row));
    const found = unknown.length ? await api(`/api/items?${unknown.map((row) => `rows=${row}`).join("&")}`).catch((error) => error) : [];
    if (found instanceof Error) return this.note(found.message, true);
    for (const hit of found) this.hits.set(hit.row, hit);
    if (this.rows !== all) return; // meanwhile others were collected
    byId("collected-items").replaceChildren(...rows.map((row) => this.item(this.hits.get(row))));
    byId("collected-more").textContent = rows.length < all.size ? `The last ${count(rows.length)} of ${count(all.size)} are shown.` : "";
  }

  item(hit) {
    const url = this.index.image(hit, "thumbnail");
    return element("li", {},
      url === null ? null : element("img", {
        src: url, alt: "", loading: "lazy", width: 112, height: 112, onerror: (event) => event.target.remove(),
      }),
      element("span", { class: "captions" }, caption(hit)),
      element("button", { type: "button", "aria-label": `Remove ${caption(hit)}`, onclick: (event) => this.remove(hit, event.target) }, "Remove"));
  }

  async remove(hit, button) {
    const place = [...byId("collected-items").querySelectorAll("button")].indexOf(button);
    this.toggle(hit);
    await this.showPanel(this.rows.size > 0);
    const others = byId("collected-items").querySelectorAll("button");
    (this.rows.size ? others[Math.min(place, others.length - 1)] : byId("collected-undo")).focus();
  }

  async with(action) {
    try {
      this.note(await action());
    } catch (error) {
      this.note(error.message, true);
    }
  }

  send(method) {
    const body = new DataView(new ArrayBuffer(4 * this.rows.size));
    [...this.rows].forEach((row, place) => body.setUint32(4 * place, row, true));
    return send(`/api/selection?version=${this.index.info.version}`, { method, headers: { "Content-Type": "application/octet-stream" }, body });
  }

  async download() {
    const url = URL.createObjectURL(await (await this.send("POST")).blob());
    element("a", { href: url, download: "selection.parquet" }).click();
    setTimeout(() => URL.revokeObjectURL(url), 60_000);
    return "";
  }

  async save() {
    const { name, num_samples: size } = await (await this.send("PUT")).json();
    return `${name} has ${count(size)} ${size === 1 ? "sample" : "samples"}.`;
  }
}
