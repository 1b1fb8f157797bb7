// Starts the page: requests what the server holds, then connects its views.

import { loadCards } from "./cards.js";
import { CoverageView } from "./coverage.js";
import { Index, NOUNS, byId, count } from "./dom.js";
import { MapView } from "./map.js";
import { Search } from "./search.js";

const VIEWS = ["search", "map", "coverage", "cards"];

function addTabs(onShow) {
  const tabs = VIEWS.map((view) => byId(`tab-${view}`));
  const show = (wanted, isChosen = false) => {
    const view = tabs.some((tab) => tab.id === `tab-${wanted}` && !tab.hidden) ? wanted : VIEWS[0];
    for (const name of VIEWS) {
      byId(name).hidden = name !== view;
      byId(`tab-${name}`).setAttribute("aria-selected", String(name === view));
      byId(`tab-${name}`).tabIndex = name === view ? 0 : -1;
    }
    onShow(view, isChosen);
  };
  for (const view of VIEWS) byId(`tab-${view}`).addEventListener("click", () => show(view, true));
  byId("tab-search").parentElement.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    const there = tabs.filter((tab) => !tab.hidden);
    const next = there[(there.indexOf(document.activeElement) + step + there.length) % there.length];
    next.focus();
    next.click();
  });
  return show;
}

async function start() {
  const index = await Index.open();
  const { info } = index;
  document.title = `${info.name} · embedcache`;
  byId("name").textContent = info.name;
  byId("holds").textContent = `${count(info.num_items)} ${NOUNS[info.modality]}`;
  byId("credit").textContent = info.credit;
  byId("missing").textContent = info.missing_images ?? "";
  byId("tab-coverage").hidden = !info.has_coverage;
  let coverage, map;
  const show = addTabs((view, isChosen) => {
    search.view = view;
    if (isChosen) search.storeAddress();
    if (view === "map") map.load();
    if (view === "coverage") coverage.load();
    if (view === "cards") loadCards(byId("cards"));
  });
  const search = new Search(index, show);
  coverage = new CoverageView(byId("coverage"), search);
  map = new MapView(byId("map"), search);
  search.open();
  await search.loadAddress();
  if (!search.query) byId("query").focus();
  document.body.dataset.ready = "yes";
}

start().catch((error) => {
  byId("start").hidden = true;
  byId("panes").hidden = false;
  byId("status").textContent = error.message;
  byId("status").classList.add("error");
});
