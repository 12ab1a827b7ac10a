// What the pages do beyond links and forms: heat maps over pictures, copying, larger pictures, and keys. Reading needs none of it.
"use strict";

const settings = { style: "colour", threshold: 0.3 };
try { Object.assign(settings, JSON.parse(localStorage.getItem("heat") || "{}")); } catch { /* no storage, or not ours */ }

// Colour of a share between 0 and 1: dark violet, orange, pale yellow.
const STOPS = [[0.18, 40, 11, 84], [0.42, 159, 42, 99], [0.68, 237, 105, 37], [1, 252, 245, 160]];
function colour(share) {
  let from = STOPS[0];
  for (const to of STOPS) {
    if (share <= to[0]) {
      const t = to[0] === from[0] ? 0 : (share - from[0]) / (to[0] - from[0]);
      return from.slice(1).map((c, i) => Math.round(c + t * (to[i + 1] - c)));
    }
    from = to;
  }
  return STOPS.at(-1).slice(1);
}

function decode(text) { return Uint8Array.from(atob(text), (c) => c.charCodeAt(0)); }

// Value at a place of the grid, between the centres of the patches.
function sample(values, rows, cols, y, x) {
  const cy = Math.min(rows - 1, Math.max(0, y - 0.5)), cx = Math.min(cols - 1, Math.max(0, x - 0.5));
  const y0 = Math.floor(cy), x0 = Math.floor(cx), y1 = Math.min(rows - 1, y0 + 1), x1 = Math.min(cols - 1, x0 + 1);
  const ty = cy - y0, tx = cx - x0;
  const top = values[y0 * cols + x0] * (1 - tx) + values[y0 * cols + x1] * tx;
  const bottom = values[y1 * cols + x0] * (1 - tx) + values[y1 * cols + x1] * tx;
  return (top * (1 - ty) + bottom * ty) / 255;
}

function drawHeat(tile) {
  const picture = tile.querySelector(".picture"), image = picture && picture.querySelector("img");
  if (!image) return;
  let canvas = picture.querySelector("canvas");
  if (!canvas) { canvas = document.createElement("canvas"); canvas.setAttribute("aria-hidden", "true"); picture.append(canvas); }
  const width = Math.max(1, Math.round(image.clientWidth)), height = Math.max(1, Math.round(image.clientHeight));
  canvas.width = width; canvas.height = height;
  canvas.style.width = `${width}px`; canvas.style.height = `${height}px`;
  if (settings.style === "off") return;
  const [rows, cols] = tile.dataset.grid.split(" ").map(Number), [seenX, seenY] = tile.dataset.seen.split(" ").map(Number);
  const values = decode(tile.dataset.heat), pen = canvas.getContext("2d", { willReadFrequently: true }), pixels = pen.createImageData(width, height);
  const left = width * (1 - seenX) / 2, top = height * (1 - seenY) / 2, w = width * seenX, h = height * seenY;
  const inside = (x, y) => x >= left && x < left + w && y >= top && y < top + h;
  const at = (x, y) => inside(x, y) ? sample(values, rows, cols, (y - top) / h * rows, (x - left) / w * cols) : 0;
  const limit = Math.max(settings.threshold, 0.004);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const share = at(x + 0.5, y + 0.5), place = 4 * (y * width + x);
      if (settings.style === "colour") {
        if (share < limit) { pixels.data[place + 3] = inside(x, y) ? 40 : 0; continue; }
        const [r, g, b] = colour(share);
        pixels.data.set([r, g, b, 70 + 110 * share], place);
      } else {
        const within = share >= limit, edge = within !== (at(x + 2, y + 0.5) >= limit) || within !== (at(x + 0.5, y + 2) >= limit);
        if (edge) pixels.data.set([255, 196, 0, 255], place);
      }
    }
  }
  pen.putImageData(pixels, 0, 0);
}

const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) {
    seen.unobserve(entry.target);
    const image = entry.target.querySelector("img");
    if (image && image.complete) drawHeat(entry.target); else if (image) image.addEventListener("load", () => drawHeat(entry.target), { once: true });
  }
}, { rootMargin: "200px" });

function showTools(root) {
  for (const tools of root.querySelectorAll("[data-heat-tools]")) {
    if (!document.querySelector("[data-heat]")) continue;
    tools.hidden = false;
    for (const radio of tools.querySelectorAll("input[name=heat]")) radio.checked = radio.value === settings.style;
    const slide = tools.querySelector("[data-threshold]");
    slide.value = Math.round(100 * settings.threshold);
    tools.querySelector("[data-threshold-shown]").textContent = `${slide.value} %`;
  }
}

function prepare(root) {
  for (const tile of root.querySelectorAll("[data-heat]")) seen.observe(tile);
  showTools(root);
  preparePatches(root);
  prepareUpload(root);
}

document.addEventListener("input", (event) => {
  const tools = event.target.closest("[data-heat-tools]");
  if (!tools) return;
  if (event.target.name === "heat") settings.style = event.target.value;
  else settings.threshold = Number(event.target.value) / 100;
  try { localStorage.setItem("heat", JSON.stringify(settings)); } catch { /* private mode */ }
  showTools(document);
  for (const tile of document.querySelectorAll("[data-heat]")) seen.observe(tile);
});

document.addEventListener("change", (event) => { if (event.target.matches("select[data-submit]")) event.target.form.requestSubmit(); });

async function copy(button, text) {
  const before = button.textContent;
  try { await navigator.clipboard.writeText(text); button.textContent = "Copied"; } catch { button.textContent = "Cannot copy here"; }
  setTimeout(() => { button.textContent = before; }, 1500);
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-copy], [data-copy-link]");
  if (button) copy(button, button.dataset.copy ?? location.href);
});

// A picture at its full size, with its heat map, in a dialog; a click with a modifier key, or without JavaScript, follows the link.
function zoom(tile) {
  const shown = tile.querySelector("img"), dialog = document.createElement("dialog"), clone = document.createElement("div");
  const picture = document.createElement("span"), image = new Image(), caption = document.createElement("p"), link = document.createElement("a");
  const close = document.createElement("button");
  dialog.className = "zoom"; dialog.setAttribute("aria-label", shown.alt); picture.className = "picture"; caption.className = "tools";
  image.alt = shown.alt; image.src = shown.src;
  const ratio = shown.width / shown.height, side = Math.min(0.86 * innerWidth, 0.76 * innerHeight * Math.max(1, ratio), 900);
  image.width = Math.round(ratio >= 1 ? side : side * ratio); image.height = Math.round(image.width / ratio);
  if (shown.classList.contains("sharp")) image.classList.add("sharp");
  if (tile.dataset.large) { const large = new Image(); large.onload = () => { image.src = large.src; image.classList.toggle("sharp", large.naturalWidth < 96); }; large.src = tile.dataset.large; }
  link.href = tile.href; link.textContent = shown.alt || "to the image"; close.type = "button"; close.className = "quiet"; close.textContent = "Close";
  close.onclick = () => dialog.close();
  caption.append(link, ` ${tile.querySelector(".note")?.textContent ?? ""} `, close);
  picture.append(image); clone.append(picture);
  for (const name of ["heat", "grid", "seen"]) if (tile.dataset[name]) clone.dataset[name] = tile.dataset[name];
  dialog.append(clone, caption); document.body.append(dialog);
  dialog.onclose = () => { dialog.remove(); tile.focus(); };
  dialog.onclick = (event) => { if (event.target === dialog) dialog.close(); };
  dialog.showModal();
  if (clone.dataset.heat) { if (image.complete) drawHeat(clone); else image.addEventListener("load", () => drawHeat(clone), { once: true }); }
}

document.addEventListener("click", (event) => {
  const tile = event.target.closest("a.tile[data-zoom]");
  if (tile && !event.ctrlKey && !event.metaKey && !event.shiftKey && event.button === 0) { event.preventDefault(); zoom(tile); }
});

// The latents of a patch, under the pointer or moved to with the arrow keys.
function preparePatches(root) {
  for (const box of root.querySelectorAll("[data-patches]")) {
    if (box.ready) continue;
    box.ready = true;
    const { patches, names } = JSON.parse(box.dataset.patches), [rows, cols] = box.dataset.grid.split(" ").map(Number);
    const [seenX, seenY] = box.dataset.seen.split(" ").map(Number), list = box.closest("figure").querySelector("[data-patch-list]");
    const spot = document.createElement("span");
    let row = 0, col = 0, shown = -1;
    spot.className = "spot"; spot.hidden = true; box.append(spot);
    const show = () => {
      const w = box.clientWidth, h = box.clientHeight, place = row * cols + col;
      spot.hidden = false;
      spot.style.left = `${w * ((1 - seenX) / 2 + seenX * col / cols)}px`; spot.style.top = `${h * ((1 - seenY) / 2 + seenY * row / rows)}px`;
      spot.style.width = `${w * seenX / cols}px`; spot.style.height = `${h * seenY / rows}px`;
      if (place === shown) return;
      shown = place;
      const title = document.createElement("p"), items = document.createElement("ol");
      title.textContent = `Row ${row + 1}, column ${col + 1}` + (patches[place].length ? "" : ": no latent fires here");
      for (const [latent, act] of patches[place]) {
        const item = document.createElement("li"), link = document.createElement("a");
        link.href = `/features/${encodeURIComponent(box.dataset.sae)}/${latent}`; link.textContent = names[latent] ?? "without a name";
        item.append(link, ` ${latent}, ${act.toFixed(2)}`); items.append(item);
      }
      list.replaceChildren(title, items);
    };
    const point = (event) => {
      const at = box.getBoundingClientRect(), x = (event.clientX - at.left) / at.width, y = (event.clientY - at.top) / at.height;
      const c = Math.floor((x - (1 - seenX) / 2) / seenX * cols), r = Math.floor((y - (1 - seenY) / 2) / seenY * rows);
      if (c >= 0 && c < cols && r >= 0 && r < rows) { row = r; col = c; show(); }
    };
    box.addEventListener("pointermove", point);
    box.addEventListener("pointerdown", point);  // a finger does not move before it touches
    box.addEventListener("focus", show);
    box.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (!step) return;
      event.preventDefault();
      row = Math.min(rows - 1, Math.max(0, row + step[0])); col = Math.min(cols - 1, Math.max(0, col + step[1]));
      show();
    });
  }
}

// An image that is pasted or dropped anywhere on a page with a form for one; the model begins to load as soon as the form is there.
function prepareUpload(root) {
  for (const form of root.querySelectorAll("form[data-upload]")) {
    const input = form.querySelector("input[type=file]"), state = form.querySelector("[data-upload-state]"), said = state.textContent;
    const take = (files) => {
      const images = [...files].filter((file) => file.type.startsWith("image/"));
      if (!images.length) { state.textContent = "That is no image."; return; }
      const box = new DataTransfer();
      box.items.add(images[0]);
      input.files = box.files;
      form.requestSubmit();
    };
    document.addEventListener("paste", (event) => { if (event.clipboardData?.files.length) take(event.clipboardData.files); });
    document.addEventListener("dragover", (event) => { event.preventDefault(); form.classList.add("over"); });
    document.addEventListener("dragleave", () => form.classList.remove("over"));
    document.addEventListener("drop", (event) => { event.preventDefault(); form.classList.remove("over"); take(event.dataTransfer.files); });
    form.addEventListener("submit", () => { state.textContent = "Looking…"; });
    form.addEventListener("htmx:afterSwap", () => { state.textContent = said; });
    const sae = form.querySelector("input[name=sae]")?.value, address = sae ? `/api/model?sae=${encodeURIComponent(sae)}` : "/api/model";
    const look = async () => {
      const found = await (await fetch(address)).json();
      if (found.state === "loading") {
        state.textContent = `The model is being loaded: ${Math.round(found.elapsed)} of about ${Math.max(1, Math.round(found.expected))} s.`;
        setTimeout(look, 1000);
      } else state.textContent = found.state === "ready" ? said : `The model cannot be used: ${found.problem}`;
    };
    look().catch(() => { state.textContent = said; });
  }
}

document.addEventListener("DOMContentLoaded", () => prepare(document));
document.addEventListener("htmx:afterSettle", (event) => prepare(event.target));
document.addEventListener("htmx:configRequest", (event) => { event.detail.headers["X-CSRF-Token"] = document.querySelector("meta[name=csrf]").content; });
// A list or a search that is refused: its own address says why. Forms of review and of steering tell it in their place.
document.addEventListener("htmx:responseError", (event) => {
  const upload = event.target.closest("form[data-upload]");
  if (upload) {
    const page = new DOMParser().parseFromString(event.detail.xhr.responseText, "text/html");
    upload.querySelector("[data-upload-state]").textContent = page.querySelector(".problem")?.textContent || page.body.textContent.trim();
  } else if (event.detail.requestConfig.verb === "get" && !event.target.closest("[data-steer]")) location.assign(event.detail.pathInfo.finalRequestPath);
});
window.addEventListener("resize", () => { for (const tile of document.querySelectorAll("[data-heat]")) seen.observe(tile); });

// The SQL console: Ctrl+Enter runs, Cancel ends the request (the server then stops the statement), names are inserted by a click.
const editor = () => document.querySelector("[data-editor]");
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target.matches("[data-editor]")) {
    event.preventDefault();
    event.target.form.requestSubmit();
  }
});
let running = 0;
function showRunning(since) {
  clearInterval(running);
  const cancel = document.querySelector("[data-cancel]"), said = document.querySelector("[data-running]");
  if (!cancel) return;
  cancel.hidden = !since;
  said.textContent = since ? "Running…" : "";
  if (since) running = setInterval(() => { said.textContent = `Running for ${Math.round((Date.now() - since) / 1000)} s…`; }, 1000);
}
document.addEventListener("submit", (event) => { if (event.target.matches("form[data-runs]")) showRunning(Date.now()); });
window.addEventListener("pageshow", () => showRunning(0));
document.addEventListener("click", (event) => {
  if (event.target.closest("[data-cancel]")) {
    window.stop();
    showRunning(0);
    document.querySelector("[data-running]").textContent = "Cancelled.";
  }
  const name = event.target.closest("button.insert");
  if (name && editor()) {
    event.preventDefault();
    editor().setRangeText(name.textContent, editor().selectionStart, editor().selectionEnd, "end");
    editor().focus();
  }
});
document.addEventListener("DOMContentLoaded", () => {
  for (const code of document.querySelectorAll("code[data-insert]")) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "insert";
    button.title = "Insert into the statement";
    code.replaceWith(button);
    button.append(code);
  }
});
