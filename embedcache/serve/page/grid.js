// Hits as a grid with keyboard navigation, and a dialog that shows one of them.

import { api, byId, element, failure } from "./dom.js";
import { play, player } from "./player.js";

export const caption = (hit) => hit.captions.join(" · ") || hit.name;

const names = typeof Intl.DisplayNames === "function" ? new Intl.DisplayNames(["en"], { type: "language" }) : null;

function languageName(code) {
  if (code === null) return "unknown language";
  try {
    return names?.of(code) ?? code;
  } catch { // not a code of a language
    return code;
  }
}

function folded(hit) {
  const others = hit.languages.slice(1);
  if (!others.length) return null;
  return element("span", { class: "folded", title: others.map(languageName).join(", ") }, `+${others.length} ${others.length === 1 ? "language" : "languages"}`);
}

function card(hit, place, { index, collection, onOpen, onSimilar, threshold }) {
  const isAbove = threshold !== undefined && hit.score > threshold;
  const score = hit.score === null ? null : hit.score.toFixed(3);
  const isFilm = hit.image === null && hit.player?.modality === "video"; // its player shows the frame
  const url = index.image(hit, "thumbnail");
  const media = player(hit, caption(hit), index);
  if (media && place === 0) mediaIn(media).tabIndex = 0;
  const open = element("button", {
    type: "button",
    class: isAbove ? "hit above" : "hit",
    tabindex: place === 0 ? 0 : -1,
    "data-row": hit.row,
    "data-key": hit.key,
    "aria-label": [caption(hit), score === null ? null : `score ${score}`, isAbove ? "above the threshold" : null].filter(Boolean).join(", "),
    onclick: () => onOpen(place),
  },
    isFilm || url === null ? null : element("img", {
      src: url, alt: "", loading: "lazy", decoding: "async", width: 224, height: hit.image === null ? 112 : 224,
      onerror: (event) => event.target.replaceWith(element("span", { class: "unread" }, "cannot be read")),
    }),
    element("span", { class: "captions", lang: hit.languages[0] ?? null }, caption(hit)),
    folded(hit),
    element("span", { class: "details" },
      element("span", {}, hit.label ?? ""),
      score === null ? null : element("span", { class: "score" }, score)));
  const like = element("button", {
    type: "button", class: "like", tabindex: -1, "aria-label": `More like ${caption(hit)}`, onclick: () => onSimilar(hit),
  }, "more like this");
  const tick = element("label", { class: "tick" }, element("input", {
    type: "checkbox", tabindex: place === 0 ? 0 : -1, "data-row": hit.row, "aria-label": `Collect ${caption(hit)}`,
    checked: collection.has(hit.row), onchange: () => collection.toggle(hit),
  }));
  return element("li", {}, ...(isFilm ? [media, open] : [open, media]), tick, like);
}

function showHits(grid, hits, actions) {
  grid.classList.toggle("texts", hits.length > 0 && hits.every((hit) => hit.image === null && hit.player === null));
  grid.replaceChildren(...hits.map((hit, place) => card(hit, place, actions)));
}

export const cells = (grid) => [...grid.querySelectorAll(".hit")];

export function focusCell(grid, place) {
  const all = cells(grid);
  const chosen = all[Math.max(0, Math.min(place, all.length - 1))];
  if (!chosen) return;
  for (const cell of all)
    for (const one of [cell, mediaIn(cell.parentElement), cell.parentElement.querySelector(".tick input")])
      if (one) one.tabIndex = cell === chosen ? 0 : -1;
  chosen.focus();
  chosen.scrollIntoView({ block: "nearest" });
}

const mediaIn = (part) => part.querySelector("audio, video");

const numColumns = (grid) => getComputedStyle(grid).gridTemplateColumns.split(" ").length;

function moveInGrid(grid, event, { collection, onSimilar, hits }) {
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
  else if (event.key === "c") collection.toggle(hits()[place]);
  else if (event.key === "p") play(mediaIn(cells(grid)[place].parentElement));
  else return;
  event.preventDefault();
}

export class Grid {
  // A list of hits of one index that opens them in the dialog and searches for similar ones.
  constructor(list, index, search) {
    this.list = list;
    this.index = index;
    this.search = search;
    this.hits = [];
    list.addEventListener("keydown", (event) =>
      moveInGrid(list, event, { collection: search.collection, onSimilar: (hit) => search.searchSimilar(hit), hits: () => this.hits }));
  }

  show(hits, threshold = undefined) {
    this.hits = hits;
    showHits(this.list, hits, {
      index: this.index,
      collection: this.search.collection,
      threshold,
      onOpen: (place) => this.search.itemDialog.open(hits, place, (last) => focusCell(this.list, last)),
      onSimilar: (hit) => this.search.searchSimilar(hit),
    });
  }
}

export class ItemDialog {
  // Dialog that shows one hit in detail.
  constructor(index, collection, onSimilar) {
    this.index = index;
    this.collection = collection;
    this.hits = [];
    this.place = 0;
    this.dialog = byId("item");
    byId("item-close").addEventListener("click", () => this.dialog.close());
    byId("item-previous").addEventListener("click", () => this.show(this.place - 1));
    byId("item-next").addEventListener("click", () => this.show(this.place + 1));
    byId("item-more").addEventListener("click", () => this.similar(onSimilar));
    byId("item-collect").addEventListener("click", () => this.toggle());
    byId("item-image").addEventListener("error", (event) => { event.target.hidden = true; }); // its card says so
    this.dialog.addEventListener("click", (event) => { if (event.target === this.dialog) this.dialog.close(); });
    this.dialog.addEventListener("close", () => {
      byId("item-player").replaceChildren(); // what is removed stops playing
      this.onClose?.(this.place);
    });
    this.dialog.addEventListener("keydown", (event) => {
      const step = event.target.matches("audio, video") ? undefined : { ArrowLeft: -1, ArrowRight: 1 }[event.key]; // players have their own arrows
      if (step) this.show(this.place + step);
      else if (event.key === "m") this.similar(onSimilar);
      else if (event.key === "c") this.toggle();
      else if (event.key === "p") play(mediaIn(byId("item-player")));
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

  toggle() {
    this.collection.toggle(this.hits[this.place]);
    this.showCollected();
  }

  showCollected() {
    byId("item-collect").setAttribute("aria-pressed", String(this.collection.has(this.hits[this.place].row)));
  }

  async show(place) {
    if (place < 0 || place >= this.hits.length) return;
    this.place = place;
    const hit = this.hits[place];
    const image = byId("item-image");
    const url = hit.image === null && hit.player?.modality === "video" ? null : this.index.image(hit, "full");
    image.hidden = url === null;
    if (url !== null) {
      image.src = url;
      image.alt = caption(hit);
    }
    const media = player(hit, caption(hit), this.index, true);
    byId("item-player").replaceChildren(...[media].filter(Boolean));
    byId("item-shown").hidden = url === null && media === null;
    byId("item-title").textContent = caption(hit);
    byId("item-title").lang = hit.languages[0] ?? "";
    this.showCollected();
    byId("item-previous").disabled = place === 0;
    byId("item-next").disabled = place === this.hits.length - 1;
    const item = await api(`/api/items/${hit.row}`).catch((error) => error);
    if (this.hits[this.place] !== hit) return;
    if (item instanceof Error) {
      byId("item-captions").replaceChildren(failure(item));
      byId("item-columns").replaceChildren();
      return;
    }
    byId("item-captions").replaceChildren(...captionsByLanguage(item.captions));
    const rows = [["score", hit.score?.toFixed(3) ?? null], ["key", item.key], ["path", item.path], ...Object.entries(item.columns)];
    byId("item-columns").replaceChildren(...rows.filter(([, value]) => value !== null).map(([name, value]) =>
      element("tr", {}, element("th", { scope: "row" }, name), element("td", {}, String(value)))));
  }
}

function captionsByLanguage(captions) {
  // The first language is open, all others are folded.
  const groups = new Map();
  for (const one of captions) groups.set(one.language, [...(groups.get(one.language) ?? []), one.text]);
  const list = (language, texts) => element("ul", { lang: language }, ...texts.map((text) => element("li", {}, text)));
  return [...groups].map(([language, texts], place) => place === 0
    ? list(language, texts)
    : element("details", {}, element("summary", {}, `${languageName(language)} (${texts.length})`), list(language, texts)));
}
