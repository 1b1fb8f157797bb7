// Tables that describe each index, its run and its cache.

import { element, failure, table } from "./dom.js";

export async function loadCards(panel, indexes) {
  if (panel.querySelector("table")) return;
  try {
    const all = await Promise.all(indexes.map((index) => index.get("/api/cards")));
    panel.replaceChildren(...all.map((cards, number) => element("div", { class: "cards" }, ...cards.map((card) =>
      element("div", {},
        element("h2", {}, indexes.length > 1 ? `${"AB"[number]}: ${card.title}` : card.title),
        table(card.rows))))));
  } catch (error) {
    panel.replaceChildren(failure(error));
  }
}
