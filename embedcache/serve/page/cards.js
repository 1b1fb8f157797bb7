// Tables that describe the index, its run and its cache.

import { api, element, table } from "./dom.js";

export async function loadCards(panel) {
  if (panel.childElementCount) return;
  try {
    const cards = await api("/api/cards");
    panel.replaceChildren(element("div", { class: "cards" }, ...cards.map((card) =>
      element("div", {}, element("h2", {}, card.title), table(card.rows)))));
  } catch (error) {
    panel.replaceChildren(element("p", { class: "warning", role: "alert" }, error.message));
  }
}
