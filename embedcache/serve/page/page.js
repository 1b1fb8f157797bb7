// Starts the page: requests what the server holds, then connects the three views.

import { loadCards } from "./cards.js";
import { CoverageView } from "./coverage.js";
import { api, byId, count, setVersion } from "./dom.js";
import { Search } from "./search.js";

const VIEWS = ["search", "coverage", "cards"];

function addTabs(onShow) {
  const tabs = VIEWS.map((view) => byId(`tab-${view}`));
  const show = (view) => {
    for (const name of VIEWS) {
      byId(name).hidden = name !== view;
      byId(`tab-${name}`).setAttribute("aria-selected", String(name === view));
      byId(`tab-${name}`).tabIndex = name === view ? 0 : -1;
    }
    onShow(view);
  };
  for (const view of VIEWS) byId(`tab-${view}`).addEventListener("click", () => show(view));
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
  const info = await api("/api/info");
  setVersion(info.version);
  document.title = `${info.name} · embedcache`;
  byId("name").textContent = info.name;
  byId("holds").textContent = `${count(info.num_items)} ${info.modality}s`;
  byId("credit").textContent = info.credit;
  byId("missing").textContent = info.missing_images ?? "";
  byId("tab-coverage").hidden = !info.has_coverage;
  let coverage;
  const show = addTabs((view) => {
    if (view === "coverage") coverage.load();
    if (view === "cards") loadCards(byId("cards"));
  });
  const search = new Search(info, show);
  coverage = new CoverageView(byId("coverage"), search);
  await search.loadAddress();
  if (!search.query) byId("query").focus();
  document.body.dataset.ready = "yes";
}

start().catch((error) => {
  byId("status").textContent = error.message;
  byId("status").classList.add("error");
});
