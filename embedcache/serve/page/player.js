// Players of recordings and videos, one of which plays at a time.

import { element, send } from "./dom.js";

const NAMES = { audio: "Recording", video: "Video" };

const posters = new IntersectionObserver((seen) => {
  // A poster is loaded when it is seen, as lazy images are.
  for (const { isIntersecting, target } of seen) {
    if (!isIntersecting) continue;
    posters.unobserve(target);
    target.poster = target.dataset.poster;
  }
}, { rootMargin: "400px" });

document.addEventListener("play", ({ target }) => {
  for (const other of document.querySelectorAll("audio, video")) if (other !== target) other.pause();
}, true);

export function player(hit, name, index, isOpen = false) {
  // The player of a hit; null if there is nothing to play. The server cuts recordings to their interval; of a video, the rest is not played.
  if (hit.player === null) return null;
  const { modality, row, start_s: start, stop_s: stop } = hit.player;
  const url = index.media(modality, row, "play");
  const isPart = modality === "video" && (start !== null || stop !== null);
  const media = element(modality, {
    controls: true, preload: "none", playsinline: true, tabindex: isOpen ? 0 : -1, "aria-label": `${NAMES[modality]}: ${name}`,
    src: isPart ? `${url}#t=${start ?? 0}${stop === null ? "" : `,${stop}`}` : url,
    "data-poster": modality === "video" ? index.media("video", row, isOpen ? "full" : "thumbnail") : null,
  });
  if (modality === "video") posters.observe(media);
  if (isPart && stop !== null) media.addEventListener("play", () => stopAt(media, start ?? 0, stop));
  const problem = element("p", { class: "problem", role: "status" });
  media.addEventListener("error", async () => { problem.textContent = await reason(url, modality); });
  return element("div", { class: "player" }, media, problem);
}

function stopAt(media, start, stop) {
  // Browsers do so by the end of the URL, but only once. Events of the time are too rare for the end of a word.
  if (media.paused) return;
  if (media.currentTime < stop) requestAnimationFrame(() => stopAt(media, start, stop));
  else {
    media.pause();
    media.currentTime = start;
  }
}

async function reason(url, modality) {
  try {
    await send(url, { headers: { Range: "bytes=0-0" } });
    return `This browser cannot play this ${modality === "video" ? "video" : "recording"}.`;
  } catch (error) {
    return `Not playable: ${error.message}`;
  }
}

export function play(media) {
  if (!media) return;
  if (media.paused) media.play().catch(() => { /* the player says why */ });
  else media.pause();
}
