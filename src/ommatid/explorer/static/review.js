// Keys of the pages of review, and what happened to a form that was sent in place. All of it works without: forms and links are plain.
"use strict";

const report = document.createElement("p");
report.id = "review-report"; report.setAttribute("role", "status"); report.hidden = true;

function say(text, isProblem) {
  report.textContent = text; report.className = isProblem ? "problem" : "unseen"; report.hidden = false;
}

function keysAreOn() {
  const box = document.getElementById("keys-on");
  return box !== null && box.checked;
}

document.addEventListener("DOMContentLoaded", () => {
  document.querySelector("#review")?.before(report);
  const box = document.getElementById("keys-on");
  if (!box) return;
  box.closest("[data-keys-switch]").hidden = false;
  try { box.checked = localStorage.getItem("review-keys") !== "off"; } catch { /* no storage */ }
  box.addEventListener("change", () => { try { localStorage.setItem("review-keys", box.checked ? "on" : "off"); } catch { /* no storage */ } });
});

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing || document.querySelector("dialog[open]")) return;
  if (event.target.closest("input:not([type=radio]):not([type=checkbox]):not([type=range]), textarea, select, [contenteditable]")) {
    if (event.key === "Escape" && event.target.closest("#review")) event.target.blur();
    return;
  }
  if (!keysAreOn()) return;
  if (event.key === "?") { const help = document.querySelector("details.keys"); help.open = !help.open; event.preventDefault(); return; }
  const name = CSS.escape(event.key);
  const field = document.querySelector(`[data-key-focus~="${name}"]`), act = document.querySelector(`[data-key="${name}"]`);
  if (event.repeat && act?.tagName === "BUTTON") return;
  if (field) { event.preventDefault(); field.focus(); field.select?.(); } else if (act) { event.preventDefault(); act.click(); }
});

// A form that was sent in place: what is half written elsewhere stays, and the name's field gives its focus back, so that keys work again.
let unsent = {};
document.addEventListener("htmx:beforeRequest", (event) => { if (event.target.closest("#review, #suggestions")) report.hidden = true; });
document.addEventListener("htmx:beforeSwap", (event) => {
  const fields = [...document.querySelectorAll("#review-name, #review-list, #review-comment")];
  const isUnsent = (field) => field.value !== field.defaultValue && field.form !== event.detail.requestConfig?.elt;
  unsent = Object.fromEntries(fields.filter(isUnsent).map((field) => [field.id, field.value]));
});
document.addEventListener("htmx:afterSwap", (event) => {
  if (event.target.id !== "review") return;
  say("Recorded.", false);
  for (const [id, value] of Object.entries(unsent)) document.getElementById(id).value = value;
  if (document.activeElement?.matches("#review-name")) document.activeElement.blur();
});
for (const name of ["htmx:responseError", "htmx:sendError"]) {
  document.addEventListener(name, (event) => {
    const page = new DOMParser().parseFromString(event.detail.xhr?.responseText ?? "", "text/html");
    say(page.querySelector(".problem")?.textContent || page.body.textContent.trim() || "The explorer does not answer; nothing was recorded.", true);
  });
}
