// Tables that describe the index, its run and its cache.

import { api, element, failure, table } from "./dom.js";

export async function loadCards(panel) {
  if (panel.querySelector("table")) return;
  try {
    const cards = await api("/api/cards");
    panel.replaceChildren(element("div", { class: "cards" }, ...cards.map((card) =>
      element("div", {}, element("h2", {}, card.title), table(card.rows)))));
  } catch (error) {
    panel.replaceChildren(failure(error));
  }
}
