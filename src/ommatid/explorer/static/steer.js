// Steering: the slider moves between doses that were computed, patches are painted, and the form is sent when something else changes.
// Without it, forms are sent by their buttons, and the answer shows the dose that was asked for.
"use strict";

const brush = { row: 0, col: 0, painting: null, curve: null, hadFocus: false };
const form = () => document.getElementById("steer-form");
const steered = () => document.querySelector("#steered .steered");

function send() {
  const own = document.getElementById("steer-own");
  (own?.elements.upload.files.length ? own : form()).requestSubmit();
}
let waiting = 0;
function sendSoon() { clearTimeout(waiting); waiting = setTimeout(send, 350); }

// ---- doses and curves

function showDose(place) {
  const slider = document.getElementById("steer-at"), parts = [...steered().querySelectorAll("[data-at]")];
  parts.forEach((part, i) => { part.hidden = i !== place; });
  for (const plot of steered().querySelectorAll("svg.plot")) plot.querySelectorAll("line.at").forEach((line, i) => line.toggleAttribute("hidden", i !== place));
  slider.value = place;
  slider.setAttribute("aria-valuetext", parts[place].dataset.text);
  form().elements.dose.value = parts[place].dataset.dose;
  return parts[place].querySelector("[data-said]").textContent;
}

function showCurve(name) {
  const choice = document.getElementById("steer-curve"), at = [...choice.options].findIndex((option) => option.text === name);
  choice.selectedIndex = Math.max(0, at);
  steered().querySelectorAll("[data-curve]").forEach((part, i) => { part.hidden = i !== choice.selectedIndex; });
}

document.addEventListener("input", (event) => {
  if (event.target.id !== "steer-at") return;
  const said = showDose(Number(event.target.value));
  clearTimeout(event.target.saying);
  event.target.saying = setTimeout(() => { document.querySelector("[data-steer-said]").textContent = said; }, 600);
});

// ---- patches

function grid() {
  const box = document.getElementById("steer-brush");
  if (!box) return null;
  const [rows, cols] = box.dataset.grid.split(" ").map(Number), [seenX, seenY] = box.dataset.seen.split(" ").map(Number);
  return { box, rows, cols, seenX, seenY };
}

function chosenPatches() {
  const chosen = new Set();
  for (const part of form().elements.patches.value.split(",").filter(Boolean)) {
    const [first, last] = part.split("-").map(Number);
    for (let i = first; i <= (last ?? first); i++) chosen.add(i);
  }
  return chosen;
}

function choosePatches(chosen) {
  const sorted = [...chosen].sort((a, b) => a - b), parts = [];
  for (const i of sorted) {
    const last = parts.at(-1);
    if (last && last[1] === i - 1) last[1] = i; else parts.push([i, i]);
  }
  form().elements.patches.value = parts.map(([a, b]) => (a === b ? a : `${a}-${b}`)).join(",");
  const tokens = form().elements.tokens;
  if (chosen.size) tokens.value = "patches"; else if (tokens.value === "patches") tokens.value = "all";
  drawPatches();
}

function drawPatches() {
  const found = grid();
  if (!found) return;
  const { box, rows, cols, seenX, seenY } = found, chosen = form().elements.tokens.value === "patches" ? chosenPatches() : new Set();
  if (!box.querySelector("canvas")) box.append(document.createElement("canvas"), Object.assign(document.createElement("span"), { className: "spot" }));
  const canvas = box.querySelector("canvas"), w = canvas.width = box.clientWidth, h = canvas.height = box.clientHeight, pen = canvas.getContext("2d");
  const fires = box.dataset.fires ? Uint8Array.from(atob(box.dataset.fires), (c) => c.charCodeAt(0)) : [];
  const left = w * (1 - seenX) / 2, top = h * (1 - seenY) / 2, stepX = w * seenX / cols, stepY = h * seenY / rows;
  pen.strokeStyle = "rgb(255 255 255 / .25)"; pen.lineWidth = 1;
  for (let i = 0; i < rows * cols; i++) {
    const x = left + stepX * (i % cols), y = top + stepY * Math.floor(i / cols);
    pen.strokeRect(x + 0.5, y + 0.5, stepX - 1, stepY - 1);
    if (chosen.has(i)) { pen.fillStyle = "rgb(255 196 0 / .45)"; pen.fillRect(x, y, stepX, stepY); }
    if (fires[i] > 12) {
      pen.beginPath(); pen.arc(x + stepX / 2, y + stepY / 2, Math.max(2, Math.min(stepX, stepY) * (0.08 + 0.16 * fires[i] / 255)), 0, 7);
      pen.fillStyle = "#fff"; pen.fill(); pen.strokeStyle = "#000"; pen.stroke(); pen.strokeStyle = "rgb(255 255 255 / .25)";
    }
  }
  const spot = box.querySelector(".spot");
  Object.assign(spot.style, { left: `${left + stepX * brush.col}px`, top: `${top + stepY * brush.row}px`, width: `${stepX}px`, height: `${stepY}px` });
  const all = rows * cols, here = chosen.has(brush.row * cols + brush.col) ? ", chosen" : "";
  document.querySelector("[data-brush-said]").textContent = chosen.size ? `${chosen.size} of ${all} patches are edited` : "";
  box.setAttribute("aria-label", `Patches of the image: row ${brush.row + 1}, column ${brush.col + 1}${here}; ${chosen.size} of ${all} chosen`);
  spot.hidden = document.activeElement !== box;
}

function paint(place, on) {
  const chosen = form().elements.tokens.value === "patches" ? chosenPatches() : new Set();
  if (on) chosen.add(place); else chosen.delete(place);
  choosePatches(chosen);
}

function at(event) {
  const { box, rows, cols, seenX, seenY } = grid(), here = box.getBoundingClientRect();
  const x = (event.clientX - here.left) / here.width, y = (event.clientY - here.top) / here.height;
  const col = Math.floor((x - (1 - seenX) / 2) / seenX * cols), row = Math.floor((y - (1 - seenY) / 2) / seenY * rows);
  return col >= 0 && col < cols && row >= 0 && row < rows ? { row, col, place: row * cols + col } : null;
}

function prepareBrush() {
  const { box, rows, cols } = grid();
  brush.row = Math.min(brush.row, rows - 1); brush.col = Math.min(brush.col, cols - 1);
  box.tabIndex = 0; box.setAttribute("role", "group"); box.setAttribute("aria-describedby", "steer-brush-help");
  box.addEventListener("pointerdown", (event) => {
    const found = at(event);
    if (!found || event.button) return;
    if (event.pointerType !== "touch") { event.preventDefault(); box.setPointerCapture(event.pointerId); }
    Object.assign(brush, found);
    brush.painting = !(form().elements.tokens.value === "patches" && chosenPatches().has(found.place));
    paint(found.place, brush.painting);
  });
  box.addEventListener("pointermove", (event) => {
    const found = brush.painting === null ? null : at(event);
    if (found) { Object.assign(brush, found); paint(found.place, brush.painting); }
  });
  for (const name of ["pointerup", "pointercancel"]) box.addEventListener(name, () => { if (brush.painting !== null) { brush.painting = null; sendSoon(); } });
  for (const name of ["focus", "blur"]) box.addEventListener(name, drawPatches);
  box.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key], place = brush.row * cols + brush.col;
    if (step) {
      brush.row = Math.min(rows - 1, Math.max(0, brush.row + step[0])); brush.col = Math.min(cols - 1, Math.max(0, brush.col + step[1]));
      drawPatches();
    } else if (event.key === " ") {
      paint(place, !(form().elements.tokens.value === "patches" && chosenPatches().has(place)));
      sendSoon();
    } else return;
    event.preventDefault();
  });
  if (brush.hadFocus) box.focus({ preventScroll: true });
  const image = box.querySelector("img");
  if (image.complete) drawPatches(); else image.addEventListener("load", drawPatches, { once: true });
}

// ---- what was answered, and when to ask again

function prepareSteering() {
  for (const part of document.querySelectorAll("[data-needs-script]")) part.hidden = false;
  for (const part of document.querySelectorAll("[data-steer] noscript")) part.remove();  // whose fields are real in what htmx puts in place
  if (!form() || !steered() || steered().ready) return;
  steered().ready = true;
  if (grid()) prepareBrush();
  showCurve(brush.curve);
  document.querySelector("[data-steer-said]").textContent = showDose(Number(document.getElementById("steer-at").value));
}

document.addEventListener("change", (event) => {
  const field = event.target, box = form();
  if (field.id === "steer-curve") { brush.curve = field.selectedOptions[0].text; showCurve(brush.curve); return; }
  if (field.id === "upload") { document.getElementById("looked")?.replaceChildren(); return; }  // which is about another image
  if (field.id === "steer-upload") { if (field.files.length) send(); return; }
  if (!box || field.form !== box) return;
  if (field.name === "image") { document.getElementById("steer-own").reset(); choosePatches(new Set()); send(); return; }
  if (field.name === "tokens") drawPatches();
  if (field.name === "latents" && !box.querySelector("[name=latents]:checked")) return;
  if (field.name === "tokens" && field.value === "patches" && !chosenPatches().size) return;  // until one is painted
  if (steered() || field.name === "latents") sendSoon();
});

document.addEventListener("click", (event) => {
  if (event.target.closest("[data-brush-clear]")) { choosePatches(new Set()); send(); }
  const one = event.target.closest("[data-steer-latent]");
  if (one && form()) {
    for (const box of form().querySelectorAll("[name=latents]")) box.checked = box.value === one.dataset.steerLatent;
    send();
  }
});

function tell(event, text) {
  const place = event.target.closest?.("[data-steer]")?.querySelector("[data-steer-problem]");
  if (place) { place.textContent = text; place.hidden = !text; }
}
document.addEventListener("htmx:beforeRequest", (event) => tell(event, ""));
document.addEventListener("htmx:responseError", (event) => {
  const page = new DOMParser().parseFromString(event.detail.xhr.responseText, "text/html");
  tell(event, page.querySelector(".problem")?.textContent || page.body.textContent.trim());
});
document.addEventListener("htmx:beforeSwap", () => { brush.hadFocus = document.activeElement?.id === "steer-brush"; });
document.addEventListener("htmx:sendError", (event) => tell(event, "The explorer does not answer."));
document.addEventListener("DOMContentLoaded", prepareSteering);
document.addEventListener("htmx:afterSettle", prepareSteering);
window.addEventListener("resize", () => { if (steered()) drawPatches(); });
