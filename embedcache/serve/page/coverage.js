// Concepts as bars with their intervals, the most similar items of the selected one, and questions that settle it.

import { api, count, element, failure, post, table } from "./dom.js";
import { Grid, caption } from "./grid.js";

const MAX_BARS = 200;

const estimate = ({ count: number, low, high }) =>
  number === null ? "cannot tell" : `${count(number)} [${count(low)}, ${count(high)}]`;

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
    this.build();
    this.draw();
    if (this.shown.length) this.select(this.shown[0].number);
  }

  build() {
    const { parts, texts, warnings, min_count: least, concepts } = this.coverage;
    const rows = [
      ["items", ...parts.map((part) => count(part.items))],
      ["items above any threshold", ...parts.map((part) => `${count(part.covered)} (${(100 * part.covered / Math.max(1, part.items)).toFixed(1)}%)`)],
      [`gaps: upper bound below ${count(least)}`, ...parts.map((part) => `${count(part.gaps)} of ${count(concepts.length)}`)],
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
      element("p", {}, "An estimate and its 95% interval for each concept; your answers about some items narrow it."
        + (texts.length ? ` Compared with texts such as ${texts.map((text) => `“${text}”`).join(" and ")}.` : "")),
      ...warnings.map((warning) => element("p", { class: "warning" }, warning)),
      element("div", { class: "scroll" }, table(rows, { head: ["", ...parts.map((part) => part.name)] })),
      element("div", { class: "tools" }, this.find, this.order, element("label", {}, this.gaps, "gaps only"), this.summary),
      element("div", { class: "covered" }, element("div", {}, this.bars, this.all), this.gallery));
  }

  draw() {
    const wanted = this.find.value.trim().toLowerCase();
    const last = (concept) => concept.counts[concept.counts.length - 1].count ?? Infinity;
    const first = (concept) => concept.counts[0].count ?? -1;
    const orders = {
      most: (a, b) => first(b) - first(a), fewest: (a, b) => last(a) - last(b), name: (a, b) => a.name.localeCompare(b.name),
    };
    const matching = this.coverage.concepts
      .filter((concept) => (!this.gaps.checked || concept.is_gap) && concept.name.toLowerCase().includes(wanted))
      .sort(orders[this.order.value]);
    this.shown = matching.slice(0, this.limit);
    this.largest = Math.max(1, ...this.coverage.concepts.flatMap((concept) => concept.counts.map((part) => part.count ?? 0)));
    this.all.hidden = this.shown.length === matching.length;
    this.summary.textContent = `${count(matching.length)} of ${count(this.coverage.concepts.length)} concepts`;
    this.bars.replaceChildren(...this.shown.map((concept) => this.bar(concept)));
  }

  bar(concept) {
    const numbers = concept.counts.map(estimate).join(" → ");
    const bars = concept.counts.map((part) => {
      const bar = element("span", { class: "bar" });
      bar.style.width = `${100 * (part.count ?? 0) / this.largest}%`;
      return bar;
    });
    return element("li", { class: concept.is_gap ? "gap" : null }, element("button", {
      type: "button", "data-number": concept.number, "aria-pressed": String(concept.number === this.selected),
      "aria-label": `${concept.name}: ${numbers} items${concept.is_gap ? ", a gap" : ""}${concept.num_answers ? ", answered" : ""}`,
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
    this.show(found);
  }

  show(found) {
    const grid = element("ul", { class: "grid", "aria-label": `The most similar items of ${found.name}` });
    new Grid(grid, this.search.index, this.search).show(found.hits, found.threshold);
    const { best, certain } = found.counts[0];
    const button = this.search.info.takes.includes("text")
      ? element("button", { type: "button", onclick: () => this.search.searchText(found.name) }, "Search for this concept") : null;
    this.gallery.replaceChildren(
      element("div", { class: "tools" }, element("h2", {}, found.name), button),
      element("p", { role: "status" }, `${found.counts.map(estimate).join(" → ")} items; best concept of ${count(best)}, certain for ${count(certain)}.`),
      element("details", { open: found.num_answers > 0 },
        element("summary", {}, `Settle it: do these items show “${found.name}”? ${found.num_answers} of ${found.strip.length} answered`),
        element("ol", { class: "strip" }, ...found.strip.map((hit) => this.question(found, hit)))),
      element("p", {}, `The most similar items; those above the threshold ${found.threshold.toFixed(3)} are framed.`),
      grid);
  }

  question(found, hit) {
    const index = this.search.index;
    const url = index.image(hit, "thumbnail");
    const choice = (shows, text) => element("button", {
      type: "button", "aria-pressed": String(hit.shows === shows), "aria-label": `${text}: ${caption(hit)}`,
      onclick: () => this.answer(found.number, hit.row, hit.shows === shows ? null : shows),
    }, text);
    return element("li", {},
      url === null ? null : element("img", { src: url, alt: "", loading: "lazy", width: 112, height: 112 }),
      element("span", { class: "captions" }, caption(hit)),
      element("span", { class: "choices" }, choice(true, "yes"), choice(false, "no")));
  }

  async answer(number, row, shows) {
    const found = await post(`/api/coverage/${number}/answer`, { row, shows }).catch((error) => error);
    if (found instanceof Error) {
      this.gallery.prepend(failure(found));
      return;
    }
    const place = this.coverage.concepts.findIndex((concept) => concept.number === number);
    this.coverage.concepts[place] = found;
    this.draw();
    if (this.selected !== number) return;
    this.show(found);
    this.gallery.querySelector("details").open = true;
    const next = [...this.gallery.querySelectorAll(".strip li")][found.strip.findIndex((hit) => hit.row === row)];
    next?.querySelector("button")?.focus();
  }
}
