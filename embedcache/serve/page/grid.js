// Hits as a grid with keyboard navigation, and a dialog that shows one of them.

import { api, byId, element, imageUrl } from "./dom.js";

export const caption = (hit) => hit.captions.join(" · ") || hit.key;

function card(hit, place, { onOpen, onSimilar, threshold }) {
  const isAbove = threshold !== undefined && hit.score > threshold;
  const open = element("button", {
    type: "button",
    class: isAbove ? "hit above" : "hit",
    tabindex: place === 0 ? 0 : -1,
    "data-row": hit.row,
    "aria-label": `${caption(hit)}, cosine ${hit.score.toFixed(3)}${isAbove ? ", above the threshold" : ""}`,
    onclick: () => onOpen(place),
  },
    hit.image === null ? null : element("img", {
      src: imageUrl(hit.image, "thumbnail"), alt: "", loading: "lazy", decoding: "async", width: 224, height: 224,
    }),
    element("span", { class: "captions" }, caption(hit)),
    element("span", { class: "details" },
      element("span", {}, hit.label ?? ""),
      element("span", { class: "score" }, hit.score.toFixed(3))));
  const like = element("button", {
    type: "button", class: "like", tabindex: -1, "aria-label": `More like ${caption(hit)}`, onclick: () => onSimilar(hit),
  }, "more like this");
  return element("li", {}, open, like);
}

export function showHits(grid, hits, actions) {
  grid.classList.toggle("texts", hits.length > 0 && hits.every((hit) => hit.image === null));
  grid.replaceChildren(...hits.map((hit, place) => card(hit, place, actions)));
}

export const cells = (grid) => [...grid.querySelectorAll(".hit")];

export function focusCell(grid, place) {
  const all = cells(grid);
  const chosen = all[Math.max(0, Math.min(place, all.length - 1))];
  if (!chosen) return;
  for (const cell of all) cell.tabIndex = cell === chosen ? 0 : -1;
  chosen.focus();
  chosen.scrollIntoView({ block: "nearest" });
}

const numColumns = (grid) => getComputedStyle(grid).gridTemplateColumns.split(" ").length;

export function moveInGrid(grid, event, { onSimilar, hits }) {
  const place = cells(grid).indexOf(document.activeElement);
  if (place < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -numColumns(grid), ArrowDown: numColumns(grid) };
  const last = cells(grid).length - 1;
  if (event.key in steps) {
    const next = place + steps[event.key];
    if (next >= 0 && next <= last) focusCell(grid, next);
  } else if (event.key === "Home") focusCell(grid, 0);
  else if (event.key === "End") focusCell(grid, last);
  else if (event.key === "m") onSimilar(hits()[place]);
  else return;
  event.preventDefault();
}

export class ItemDialog {
  // Dialog that shows one hit in detail.
  constructor(onSimilar) {
    this.hits = [];
    this.place = 0;
    this.dialog = byId("item");
    byId("item-close").addEventListener("click", () => this.dialog.close());
    byId("item-previous").addEventListener("click", () => this.show(this.place - 1));
    byId("item-next").addEventListener("click", () => this.show(this.place + 1));
    byId("item-more").addEventListener("click", () => this.similar(onSimilar));
    this.dialog.addEventListener("click", (event) => { if (event.target === this.dialog) this.dialog.close(); });
    this.dialog.addEventListener("close", () => this.onClose?.(this.place));
    this.dialog.addEventListener("keydown", (event) => {
      if (event.key === "ArrowLeft") this.show(this.place - 1);
      else if (event.key === "ArrowRight") this.show(this.place + 1);
      else if (event.key === "m") this.similar(onSimilar);
    });
  }

  open(hits, place, onClose) {
    this.hits = hits;
    this.onClose = onClose;
    this.show(place);
    this.dialog.showModal();
  }

  similar(onSimilar) {
    this.onClose = null;
    this.dialog.close();
    onSimilar(this.hits[this.place]);
  }

  async show(place) {
    if (place < 0 || place >= this.hits.length) return;
    this.place = place;
    const hit = this.hits[place];
    const image = byId("item-image");
    image.hidden = hit.image === null;
    if (hit.image !== null) {
      image.src = imageUrl(hit.image, "full");
      image.alt = caption(hit);
    }
    byId("item-title").textContent = caption(hit);
    byId("item-previous").disabled = place === 0;
    byId("item-next").disabled = place === this.hits.length - 1;
    const item = await api(`/api/items/${hit.row}`);
    if (this.hits[this.place] !== hit) return;
    byId("item-captions").replaceChildren(...item.captions.map((one) =>
      element("li", {}, one.text, one.language ? element("span", { class: "language" }, ` ${one.language}`) : null)));
    const rows = [["cosine", hit.score.toFixed(3)], ["key", item.key], ...Object.entries(item.columns)];
    byId("item-columns").replaceChildren(...rows.filter(([, value]) => value !== null).map(([name, value]) =>
      element("tr", {}, element("th", { scope: "row" }, name), element("td", {}, String(value)))));
  }
}
