// The search of a static copy: rows of the table that lack one of the words are hidden as people type.
"use strict";

const tools = document.querySelector("[data-filter]"), rows = [...document.querySelectorAll("[data-filtered] tbody tr")];
const texts = rows.map((row) => row.textContent.toLowerCase()), field = tools.querySelector("input");

function filter() {
  const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  rows.forEach((row, i) => { row.hidden = !words.every((word) => texts[i].includes(word)); shown += !row.hidden; });
  tools.querySelector("[data-filter-shown]").textContent = `${shown} of ${rows.length}`;
}

tools.hidden = false;
field.addEventListener("input", filter);
filter();
