// The map of an index: points on a canvas, with names when seen from afar and images from near, and its clusters as a list.

import { NOUNS, api, count, element, failure, ready, send } from "./dom.js";
import { Grid, caption } from "./grid.js";
import { Points } from "./points.js";

const MARGIN = 0.04;
const MAX_ZOOM = 400;
const IMAGE_PX = 64; // side of an image on the map
const MAX_WITH_IMAGES = 3000; // visible points below which images are shown
const FEW = 150; // as MAX_WITH_IMAGES, where the map is not zoomed
const MAX_IMAGES = 300; // kept
const NEAR_PX = 14;
const LASSO_PX = 4; // between two corners

const nameOf = (cluster) => cluster.name || "no name";

const HUES = [211, 28, 142, 350, 265, 190, 52, 320, 95, 12, 235, 165];

export class MapView {
  constructor(panel, search) {
    this.panel = panel;
    this.search = search;
    this.index = search.index;
    this.images = new Map(); // row of an image -> Image
    this.captions = new Map(); // row -> text
    this.dark = matchMedia("(prefers-color-scheme: dark)");
    this.dark.addEventListener("change", () => this.redraw());
    document.addEventListener("collected", () => this.markCollected());
  }

  async load() {
    if (this.isLoaded) return;
    this.isLoaded = true;
    this.panel.replaceChildren(element("p", { role: "status" }, "Computing the map…"));
    try {
      const found = await ready("/api/map");
      if (found.state !== "ready") throw new Error(found.reason);
      this.map = found;
      this.points = new Points(await (await send("/api/map/points")).arrayBuffer());
    } catch (error) {
      this.isLoaded = false;
      this.panel.replaceChildren(failure(error));
      return;
    }
    this.selected = null;
    this.marked = new Uint8Array(this.points.size); // 1 for each point that is collected
    this.view = { x: 0.5, y: 0.5, zoom: 1 };
    this.build();
    this.resize();
    this.markCollected();
  }

  markCollected() {
    if (!this.points) return;
    const { collection } = this.search;
    this.marked = this.points.rows.map((row) => Number(collection.has(row)));
    this.redraw();
  }

  collect(corners) {
    this.search.collection.setRows(this.points.inside(corners).map((i) => this.points.rows[i]), true);
  }

  collectVisible() {
    const { left, top, right, bottom } = this.bounds();
    this.collect([[left, top], [right, top], [right, bottom], [left, bottom]]);
  }

  setLasso(isOn) {
    this.lassoButton.setAttribute("aria-pressed", String(isOn));
    this.frame.classList.toggle("lasso", isOn);
    this.corners = null; // of the polygon that is drawn now
    this.redraw();
  }

  build() {
    const { info } = this.index;
    const { clusters, projection } = this.map;
    const drawn = this.points.size < info.num_items ? ` of ${count(info.num_items)}, drawn at random` : "";
    const about = projection === "umap"
      ? "Similar items lie together (UMAP); only short distances mean something."
      : "The two directions in which items differ most (PCA): what lies together may still differ. embedcache curate map makes a map of neighborhoods.";
    this.canvas = element("canvas", { "aria-hidden": "true" });
    this.tip = element("div", { class: "tip", hidden: true });
    this.where = element("p", { class: "status", role: "status", "aria-live": "polite" });
    const button = (text, label, action) => element("button", { type: "button", "aria-label": label, onclick: action }, text);
    this.frame = element("div", {
      class: "frame", tabindex: 0, role: "application", "aria-roledescription": "map", "aria-describedby": "map-keys",
      "aria-label": `Map of ${count(this.points.size)} ${NOUNS[info.modality]} in ${clusters.length} clusters, which the list of clusters names too`,
    }, this.canvas, this.tip);
    this.bars = element("ul", { class: "bars", "aria-label": "Clusters" }, ...clusters.map((cluster, number) => this.bar(cluster, number)));
    this.gallery = element("div", { class: "gallery" });
    this.lassoButton = button("Lasso", "Lasso: draw around items to collect them", () => this.setLasso(!this.hasLasso));
    this.lassoButton.setAttribute("aria-pressed", "false");
    this.panel.replaceChildren(
      element("div", { class: "tools" },
        element("span", {}, `${count(this.points.size)} ${NOUNS[info.modality]}${drawn}`),
        element("span", {}, this.lassoButton, " ", button("Collect visible", "Collect all items that are visible", () => this.collectVisible())),
        element("span", { class: "zoom" },
          button("+", "Zoom in", () => this.zoomBy(2)), button("−", "Zoom out", () => this.zoomBy(0.5)), button("All", "Show all", () => this.showAll()))),
      element("div", { class: "mapped" },
        element("div", {}, this.frame, this.where,
          element("p", { id: "map-keys", class: "hints" }, "Drag to move, scroll or pinch to zoom, select an item to open it. With Lasso, draw around items to collect them.",
            element("span", { class: "keys" }, " Keys: arrows, + and −, 0 for all, Enter for the item in the middle.")),
          element("p", { class: "hints" }, about)),
        this.bars),
      this.gallery);
    this.addPointer();
    this.frame.addEventListener("keydown", (event) => this.onKey(event));
    this.frame.addEventListener("focus", () => this.redraw());
    this.frame.addEventListener("blur", () => this.redraw());
    this.observer?.disconnect();
    this.observer = new ResizeObserver(() => this.resize());
    this.observer.observe(this.frame);
  }

  bar(cluster, number) {
    const swatch = element("span", { class: "swatch" });
    swatch.style.background = this.color(number);
    return element("li", {}, element("button", {
      type: "button", "aria-pressed": "false", "aria-label": `${nameOf(cluster)}: ${count(cluster.size)} items`, onclick: () => this.select(number),
    }, swatch, element("span", { class: "name" }, nameOf(cluster)), element("span", { class: "count number" }, count(cluster.size))));
  }

  color(cluster) {
    const light = this.dark.matches ? 66 : 42;
    return `hsl(${HUES[cluster % HUES.length]} 62% ${light + 7 * (Math.floor(cluster / HUES.length) % 3 - 1)}%)`;
  }

  async select(number) {
    this.selected = this.selected === number ? null : number;
    for (const [place, button] of [...this.bars.querySelectorAll("button")].entries())
      button.setAttribute("aria-pressed", String(place === this.selected));
    if (this.selected === null) {
      this.gallery.replaceChildren();
      this.showAll();
      return;
    }
    const cluster = this.map.clusters[number];
    this.moveTo(cluster.x, cluster.y, Math.max(3, this.view.zoom));
    const found = await api(`/api/map/${number}`).catch((error) => error);
    if (this.selected !== number) return;
    if (found instanceof Error) {
      this.gallery.replaceChildren(failure(found));
      return;
    }
    const { name, hits } = found;
    const grid = element("ul", { class: "grid", "aria-label": `Items in the middle of ${nameOf(cluster)}` });
    new Grid(grid, this.index, this.search).show(hits);
    const asks = name !== "" && this.index.info.takes.includes("text")
      ? element("button", { type: "button", onclick: () => this.search.searchText(name) }, `Search for “${name}”`) : null;
    this.gallery.replaceChildren(element("div", { class: "tools" }, element("h2", {}, nameOf(cluster)), asks), grid);
  }

  get hasLasso() { return this.frame.classList.contains("lasso"); }

  // Where things are: the view's center is in the middle of the canvas; at zoom 1 all points are visible.

  get scaleX() { return this.width * (1 - 2 * MARGIN) * this.view.zoom; }

  get scaleY() { return this.height * (1 - 2 * MARGIN) * this.view.zoom; }

  toScreen(x, y) {
    return [this.width / 2 + (x - this.view.x) * this.scaleX, this.height / 2 + (y - this.view.y) * this.scaleY];
  }

  toMap(left, top) {
    return [this.view.x + (left - this.width / 2) / this.scaleX, this.view.y + (top - this.height / 2) / this.scaleY];
  }

  bounds() {
    const [left, top] = this.toMap(0, 0);
    const [right, bottom] = this.toMap(this.width, this.height);
    return { left, top, right, bottom };
  }

  moveTo(x, y, zoom) {
    const within = (value) => Math.max(0, Math.min(1, value));
    this.view = { x: within(x), y: within(y), zoom: Math.max(1, Math.min(MAX_ZOOM, zoom)) };
    this.tip.hidden = true;
    this.redraw();
    this.describe();
  }

  zoomBy(factor, left = this.width / 2, top = this.height / 2) {
    const [x, y] = this.toMap(left, top);
    const zoom = Math.max(1, Math.min(MAX_ZOOM, this.view.zoom * factor));
    const kept = this.view.zoom / zoom; // the point under the pointer stays there
    this.moveTo(x + (this.view.x - x) * kept, y + (this.view.y - y) * kept, zoom);
  }

  showAll() {
    this.moveTo(0.5, 0.5, 1);
  }

  resize() {
    this.width = this.frame.clientWidth;
    this.height = this.frame.clientHeight;
    if (!this.width) return; // another tab is shown
    this.ratio = Math.min(2, devicePixelRatio || 1);
    this.canvas.width = Math.round(this.width * this.ratio);
    this.canvas.height = Math.round(this.height * this.ratio);
    this.redraw();
    this.describe();
  }

  redraw() {
    if (this.isWaiting || !this.width) return;
    this.isWaiting = true;
    requestAnimationFrame(() => {
      this.isWaiting = false;
      const started = performance.now();
      this.draw();
      this.canvas.dataset.ms = (performance.now() - started).toFixed(2);
    });
  }

  draw() {
    const pen = this.canvas.getContext("2d");
    const ranges = this.points.ranges(this.bounds());
    this.numVisible = ranges.reduce((sum, [start, stop]) => sum + stop - start, 0);
    pen.setTransform(1, 0, 0, 1, 0, 0);
    this.drawPoints(pen, ranges);
    pen.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    const boxes = [];
    this.drawNames(pen, boxes);
    const isNear = this.numVisible <= (this.view.zoom < 2 ? FEW : MAX_WITH_IMAGES); // seen from afar, images would hide the points
    if (this.index.info.has_images && isNear) this.drawImages(pen, ranges, boxes);
    if (document.activeElement === this.frame) this.drawCross(pen);
    if (this.corners) this.drawLasso(pen);
  }

  drawPoints(pen, ranges) {
    // Pixels are set in one array: 100,000 rectangles would take several times as long.
    const { width, height } = this.canvas;
    const image = pen.createImageData(width, height);
    const pixels = new Uint32Array(image.data.buffer);
    const colors = this.palette();
    const ink = colors[colors.length - 1];
    const side = Math.max(1, Math.round(this.ratio * (this.numVisible > 20_000 ? 2 : this.numVisible > MAX_WITH_IMAGES ? 3 : 6)));
    const half = side >> 1;
    const inset = Array.from({ length: side }, (_, line) => side < 5 ? 0 : Math.round(side / 2 - Math.sqrt((side / 2) ** 2 - (line + 0.5 - side / 2) ** 2)));
    const { xs, ys, clusters } = this.points;
    const [scaleX, scaleY] = [this.scaleX * this.ratio, this.scaleY * this.ratio];
    const [shiftX, shiftY] = [width / 2 - this.view.x * scaleX - half, height / 2 - this.view.y * scaleY - half];
    for (const [start, stop] of ranges)
      for (let i = start; i < stop; i += 1) {
        const left = (xs[i] * scaleX + shiftX) | 0;
        const top = (ys[i] * scaleY + shiftY) | 0;
        if (left < 0 || top < 0 || left + side > width || top + side > height) continue;
        const color = this.marked[i] ? ink : colors[clusters[i]];
        for (let line = 0, start = top * width + left; line < side; line += 1, start += width)
          for (let pixel = start + inset[line], end = start + side - inset[line]; pixel < end; pixel += 1) pixels[pixel] = color;
      }
    pen.putImageData(image, 0, 0);
  }

  palette() {
    const key = `${this.dark.matches} ${this.selected}`;
    if (this.paletteKey === key) return this.colors;
    const pen = element("canvas", { width: 1, height: 1 }).getContext("2d", { willReadFrequently: true });
    const ink = getComputedStyle(this.frame).getPropertyValue("--ink"); // the last color, of collected points
    this.colors = new Uint32Array([...this.map.clusters, null].map((cluster, number) => {
      pen.clearRect(0, 0, 1, 1);
      pen.globalAlpha = cluster === null || this.selected === null || this.selected === number ? 0.9 : 0.15;
      pen.fillStyle = cluster === null ? ink : this.color(number);
      pen.fillRect(0, 0, 1, 1);
      return new Uint32Array(pen.getImageData(0, 0, 1, 1).data.buffer)[0];
    }));
    this.paletteKey = key;
    return this.colors;
  }

  drawNames(pen, boxes) {
    // The largest clusters first; a name that would cover another one waits until the map is zoomed.
    const style = getComputedStyle(this.frame);
    pen.font = `600 13px ${style.fontFamily}`;
    pen.textAlign = "center";
    pen.textBaseline = "middle";
    pen.lineJoin = "round";
    pen.lineWidth = 4;
    for (const [number, cluster] of this.map.clusters.entries()) {
      if (!cluster.name) continue;
      if (this.selected !== null && this.selected !== number) continue;
      const [x, y] = this.toScreen(cluster.x, cluster.y);
      const half = pen.measureText(cluster.name).width / 2;
      const box = [x - half - 4, y - 10, x + half + 4, y + 10];
      if (box[0] < 0 || box[1] < 0 || box[2] > this.width || box[3] > this.height || boxes.some((other) => overlaps(box, other))) continue;
      boxes.push(box);
      pen.strokeStyle = style.getPropertyValue("--paper");
      pen.fillStyle = style.getPropertyValue("--ink");
      pen.strokeText(cluster.name, x, y);
      pen.fillText(cluster.name, x, y);
    }
  }

  drawImages(pen, ranges, boxes) {
    // One image per place that none covers yet, as many as fit; of an index of texts, none.
    if (this.index.info.modality !== "image") return;
    const taken = boxes.slice();
    const half = IMAGE_PX / 2;
    for (const [start, stop] of ranges)
      for (let i = start; i < stop; i += 1) {
        if (this.selected !== null && this.points.clusters[i] !== this.selected) continue;
        const [x, y] = this.toScreen(this.points.xs[i], this.points.ys[i]);
        const box = [x - half, y - half, x + half, y + half];
        if (box[2] < 0 || box[3] < 0 || box[0] > this.width || box[1] > this.height || taken.some((other) => overlaps(box, other))) continue;
        taken.push(box);
        this.drawImage(pen, i, box);
      }
  }

  drawImage(pen, point, [left, top]) {
    const [row, cluster] = [this.points.rows[point], this.points.clusters[point]];
    let image = this.images.get(row);
    if (!image) {
      image = new Image();
      image.addEventListener("load", () => this.redraw());
      image.src = this.index.media("image", row, "thumbnail");
    } else this.images.delete(row); // the one used last goes to the end
    this.images.set(row, image);
    if (this.images.size > MAX_IMAGES) this.images.delete(this.images.keys().next().value);
    if (!image.complete || !image.naturalWidth) return;
    const scale = IMAGE_PX / Math.max(image.naturalWidth, image.naturalHeight);
    const [width, height] = [image.naturalWidth * scale, image.naturalHeight * scale];
    pen.fillStyle = getComputedStyle(this.frame).getPropertyValue("--image");
    const [x, y] = [left + (IMAGE_PX - width) / 2, top + (IMAGE_PX - height) / 2];
    pen.fillRect(x, y, width, height);
    pen.drawImage(image, x, y, width, height);
    pen.lineWidth = this.marked[point] ? 4 : 2;
    pen.strokeStyle = this.marked[point] ? getComputedStyle(this.frame).getPropertyValue("--ink") : this.color(cluster);
    pen.strokeRect(x - 1, y - 1, width + 2, height + 2);
  }

  drawCross(pen) {
    pen.strokeStyle = getComputedStyle(this.frame).getPropertyValue("--ink");
    pen.lineWidth = 1.5;
    pen.beginPath();
    pen.moveTo(this.width / 2 - 9, this.height / 2);
    pen.lineTo(this.width / 2 + 9, this.height / 2);
    pen.moveTo(this.width / 2, this.height / 2 - 9);
    pen.lineTo(this.width / 2, this.height / 2 + 9);
    pen.stroke();
  }

  drawLasso(pen) {
    const style = getComputedStyle(this.frame);
    pen.beginPath();
    for (const [x, y] of this.corners) pen.lineTo(...this.toScreen(x, y));
    pen.closePath();
    pen.fillStyle = pen.strokeStyle = style.getPropertyValue("--main");
    pen.lineWidth = 2;
    pen.globalAlpha = 0.15;
    pen.fill("evenodd");
    pen.globalAlpha = 1;
    pen.stroke();
  }

  describe() {
    // Tells, a moment after the last movement, what is visible.
    clearTimeout(this.describing);
    this.describing = setTimeout(() => {
      const sizes = new Map();
      const { left, top, right, bottom } = this.bounds();
      for (const [start, stop] of this.points.ranges({ left, top, right, bottom }))
        for (let i = start; i < stop; i += 1)
          if (this.points.xs[i] >= left && this.points.xs[i] <= right && this.points.ys[i] >= top && this.points.ys[i] <= bottom)
            sizes.set(this.points.clusters[i], (sizes.get(this.points.clusters[i]) ?? 0) + 1);
      const total = [...sizes.values()].reduce((sum, size) => sum + size, 0);
      const names = [...sizes].sort((a, b) => b[1] - a[1]).slice(0, 3).map(([number]) => nameOf(this.map.clusters[number]));
      this.where.textContent = total ? `${count(total)} of ${count(this.points.size)} visible, most of them: ${names.join("; ")}` : "Nothing is here.";
    }, 250);
  }

  near(left, top, radius = NEAR_PX, limit = 1) {
    const [x, y] = this.toMap(left, top);
    return this.points.nearest(x, y, this.scaleY / this.scaleX, radius / this.scaleX, limit);
  }

  openMiddle() {
    const [left, top] = [this.width / 2, this.height / 2];
    for (let radius = NEAR_PX; radius < 2 * (left + top); radius *= 3)
      if (this.near(left, top, radius).length) return this.openNear(left, top, radius);
  }

  async openNear(left, top, radius = NEAR_PX) {
    // Opens the nearest item; arrows move to those that lie around it.
    if (!this.near(left, top, radius).length) return;
    const rows = this.near(left, top, Math.max(radius, 120), 24).map((i) => this.points.rows[i]);
    const hits = await api(`/api/items?${rows.map((row) => `rows=${row}`).join("&")}`).catch((error) => error);
    if (hits instanceof Error) {
      clearTimeout(this.describing); // it would replace the reason
      this.where.textContent = hits.message;
    } else this.search.itemDialog.open(hits, 0, () => this.frame.focus());
  }

  onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const step = 0.2 / this.view.zoom;
    const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
    if (event.key in moves) this.moveTo(this.view.x + moves[event.key][0], this.view.y + moves[event.key][1], this.view.zoom);
    else if (event.key === "+" || event.key === "=") this.zoomBy(2);
    else if (event.key === "-") this.zoomBy(0.5);
    else if (event.key === "0") this.showAll();
    else if (event.key === "Enter") this.openMiddle();
    else if (event.key === "Escape") this.setLasso(false);
    else return;
    event.preventDefault();
  }

  addPointer() {
    const down = new Map(); // id of a pointer -> where it is
    let moved = 0;
    const place = (event) => [event.offsetX, event.offsetY];
    this.frame.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.zoomBy(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.002)), ...place(event));
    }, { passive: false });
    this.frame.addEventListener("pointerdown", (event) => {
      this.frame.setPointerCapture(event.pointerId);
      if (!down.size) moved = 0;
      down.set(event.pointerId, place(event));
      this.corners = this.hasLasso && down.size === 1 ? [this.toMap(...place(event))] : null; // two fingers zoom
      this.hovered = undefined;
      this.tip.hidden = true;
    });
    this.frame.addEventListener("pointermove", (event) => {
      if (!down.has(event.pointerId)) {
        if (event.pointerType === "mouse") this.hover(...place(event));
        return;
      }
      const before = spread(down);
      const [x, y] = down.get(event.pointerId);
      down.set(event.pointerId, place(event));
      const after = spread(down);
      const [dx, dy] = [(event.offsetX - x) / down.size, (event.offsetY - y) / down.size];
      moved += Math.abs(dx) + Math.abs(dy);
      if (this.corners) return this.extendLasso(...place(event));
      this.moveTo(this.view.x - dx / this.scaleX, this.view.y - dy / this.scaleY, this.view.zoom);
      if (down.size === 2 && before.distance > 0) this.zoomBy(after.distance / before.distance, ...after.middle);
    });
    const up = (event) => {
      const isClick = event.type === "pointerup" && down.size === 1 && moved < 5;
      down.delete(event.pointerId);
      const { corners } = this;
      this.corners = null;
      this.redraw();
      if (corners && !isClick && event.type === "pointerup") this.collect(corners);
      else if (isClick) this.openNear(...place(event));
    };
    for (const name of ["pointerup", "pointercancel"]) this.frame.addEventListener(name, up);
    this.frame.addEventListener("pointerleave", () => { this.tip.hidden = true; });
  }

  extendLasso(left, top) {
    const [x, y] = this.toScreen(...this.corners[this.corners.length - 1]);
    if (Math.hypot(left - x, top - y) < LASSO_PX) return;
    this.corners.push(this.toMap(left, top));
    this.redraw();
  }

  hover(left, top) {
    const [found] = this.near(left, top);
    this.hovered = found;
    this.frame.classList.toggle("over", found !== undefined);
    if (found === undefined) {
      this.tip.hidden = true;
      return;
    }
    clearTimeout(this.hovering);
    this.hovering = setTimeout(() => this.showTip(found), 60);
  }

  async showTip(point) {
    const row = this.points.rows[point];
    if (!this.captions.has(row)) {
      const [hit] = await api(`/api/items?rows=${row}`).catch(() => []);
      if (!hit) return; // without an answer there is no tip
      if (this.captions.size > 1000) this.captions.clear();
      this.captions.set(row, hit);
    }
    if (this.hovered !== point) return;
    const hit = this.captions.get(row);
    this.tip.replaceChildren(
      this.index.image(hit, "thumbnail") ? element("img", {
        src: this.index.image(hit, "thumbnail"), alt: "", width: 112, height: hit.image === null ? 63 : 112, onerror: (event) => event.target.remove(),
      }) : "",
      element("span", {}, caption(hit)));
    this.tip.hidden = false;
    const [x, y] = this.toScreen(this.points.xs[point], this.points.ys[point]);
    this.tip.style.left = `${Math.max(0, Math.min(this.width - this.tip.offsetWidth, x + 14))}px`;
    this.tip.style.top = `${Math.max(0, Math.min(this.height - this.tip.offsetHeight, y + 14))}px`;
  }
}

const overlaps = (a, b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];

function spread(down) {
  const [first, second = first] = [...down.values()];
  return { distance: Math.hypot(first[0] - second[0], first[1] - second[1]), middle: [(first[0] + second[0]) / 2, (first[1] + second[1]) / 2] };
}
