// Concepts as bars with their gaps, and the most similar items of the selected one.

import { api, count, element, failure, table } from "./dom.js";
import { Grid } from "./grid.js";

const MAX_BARS = 200;

export class CoverageView {
  constructor(panel, search) {
    this.panel = panel;
    this.search = search;
    this.limit = MAX_BARS;
  }

  async load() {
    if (this.coverage) return;
    this.panel.replaceChildren(element("p", { role: "status" }, "Loading…"));
    try {
      this.coverage = await api("/api/coverage");
    } catch (error) {
      this.panel.replaceChildren(failure(error));
      return;
    }
    this.largest = Math.max(1, ...this.coverage.concepts.flatMap((concept) => concept.counts));
    this.build();
    this.draw();
    if (this.shown.length) this.select(this.shown[0].number);
  }

  build() {
    const { parts, rule, warnings, min_count: least, concepts, overlaps } = this.coverage;
    const rows = [
      ["items", ...parts.map((part) => count(part.items))],
      ["items above any threshold", ...parts.map((part) => `${count(part.covered)} (${(100 * part.covered / Math.max(1, part.items)).toFixed(1)}%)`)],
      [`gaps: concepts with fewer than ${count(least)}`, ...parts.map((part) => `${count(part.gaps)} of ${count(concepts.length)}`)],
      ["Gini coefficient", ...parts.map((part) => (part.gini === null ? "" : part.gini.toFixed(3)))],
    ];
    this.find = element("input", { type: "search", "aria-label": "Find a concept", placeholder: "Find a concept", oninput: () => this.draw() });
    this.gaps = element("input", { type: "checkbox", id: "gaps-only", onchange: () => this.draw() });
    this.order = element("select", { "aria-label": "Order", onchange: () => this.draw() },
      ...[["most", "most items first"], ["fewest", "fewest items first"], ["name", "by name"]].map(([value, text]) => element("option", { value }, text)));
    this.summary = element("span", { role: "status", "aria-live": "polite" });
    this.bars = element("ul", { class: "bars", "aria-label": "Concepts" });
    this.all = element("button", { type: "button", onclick: () => { this.limit = Infinity; this.draw(); } }, "Show all");
    this.gallery = element("div", { class: "gallery" });
    this.panel.replaceChildren(
      element("p", {}, `An item counts for every concept whose threshold its cosine exceeds; threshold: ${rule}.`),
      ...warnings.map((warning) => element("p", { class: "warning" }, warning)),
      element("div", { class: "scroll" }, table(rows, { head: ["", ...parts.map((part) => part.name)] })),
      element("div", { class: "tools" }, this.find, this.order, element("label", {}, this.gaps, "gaps only"), this.summary),
      element("div", { class: "covered" }, element("div", {}, this.bars, this.all), this.gallery),
      ...(overlaps.length ? [element("h2", {}, "Concepts that share items"), element("div", { class: "scroll" }, table(
        overlaps.map((one) => [one.concepts[0], one.concepts[1], count(one.items), one.jaccard.toFixed(3), one.cosine.toFixed(3)]),
        { head: ["concept", "and", "items of both", "Jaccard index", "cosine of the concepts"] }))] : []));
  }

  draw() {
    const wanted = this.find.value.trim().toLowerCase();
    const last = (concept) => concept.counts[concept.counts.length - 1];
    const orders = {
      most: (a, b) => b.counts[0] - a.counts[0], fewest: (a, b) => last(a) - last(b), name: (a, b) => a.name.localeCompare(b.name),
    };
    const matching = this.coverage.concepts
      .filter((concept) => (!this.gaps.checked || concept.is_gap) && concept.name.toLowerCase().includes(wanted))
      .sort(orders[this.order.value]);
    this.shown = matching.slice(0, this.limit);
    this.all.hidden = this.shown.length === matching.length;
    this.summary.textContent = `${count(matching.length)} of ${count(this.coverage.concepts.length)} concepts`;
    this.bars.replaceChildren(...this.shown.map((concept) => this.bar(concept)));
  }

  bar(concept) {
    const numbers = concept.counts.map(count).join(" → ");
    const bars = concept.counts.map((number) => {
      const bar = element("span", { class: "bar" });
      bar.style.width = `${100 * number / this.largest}%`;
      return bar;
    });
    return element("li", { class: concept.is_gap ? "gap" : null }, element("button", {
      type: "button", "data-number": concept.number, "aria-pressed": String(concept.number === this.selected),
      "aria-label": `${concept.name}: ${numbers} items${concept.is_gap ? ", a gap" : ""}`,
      onclick: () => this.select(concept.number),
    },
      element("span", { class: "name" }, concept.name),
      element("span", { class: "track" }, ...bars),
      element("span", { class: "count number" }, numbers)));
  }

  async select(number) {
    this.selected = number;
    for (const button of this.bars.querySelectorAll("button"))
      button.setAttribute("aria-pressed", String(Number(button.dataset.number) === number));
    const found = await api(`/api/coverage/${number}`).catch((error) => error);
    if (this.selected !== number) return;
    if (found instanceof Error) {
      this.gallery.replaceChildren(failure(found));
      return;
    }
    const grid = element("ul", { class: "grid", "aria-label": `The most similar items of ${found.name}` });
    new Grid(grid, this.search.indexes[0], this.search).show(found.hits, found.threshold);
    const button = this.search.info.takes.includes("text")
      ? element("button", { type: "button", onclick: () => this.search.searchText(found.name) }, "Search for this concept") : null;
    this.gallery.replaceChildren(
      element("div", { class: "tools" }, element("h2", {}, found.name), button),
      element("p", {}, `The most similar items; those above the threshold ${found.threshold.toFixed(3)} are framed.`),
      grid);
  }
}
