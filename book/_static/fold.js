/* A table that is wider than a phone's page is shown as a list: one entry per row, with the column's head before each
   cell. The table comes back as soon as there is room. */
"use strict";

const PHONE = window.matchMedia("(max-width: 600px)");

/* The heads of the columns and the cells of each row, as HTML, with cells that span rows or columns repeated. */
function grid(rows) {
  const filled = rows.map(() => []);
  rows.forEach((row, y) => {
    let x = 0;
    for (const cell of row.cells) {
      while (filled[y][x] !== undefined) x += 1;
      for (let down = 0; down < cell.rowSpan && y + down < rows.length; down += 1) {
        for (let across = 0; across < cell.colSpan; across += 1) filled[y + down][x + across] = cell.innerHTML.trim();
      }
      x += cell.colSpan;
    }
  });
  return filled;
}

function folded(table) {
  const heads = table.tHead ? grid([...table.tHead.rows]) : [];
  const list = document.createElement("div");
  list.className = "folded";
  for (const cells of [...table.tBodies].flatMap((body) => grid([...body.rows]))) {
    const entry = document.createElement("div");
    const named = document.createElement("dl");
    cells.forEach((cell, x) => {
      const head = heads.map((row) => row[x] || "").filter((text) => text).join(", ");
      if (head) named.insertAdjacentHTML("beforeend", `<dt>${head}</dt><dd>${cell || "(empty)"}</dd>`);
      else if (cell) entry.insertAdjacentHTML("beforeend", `<div class="bare">${cell}</div>`);
    });
    if (named.childElementCount) entry.append(named);
    list.append(entry);
  }
  return list;
}

function fit(table) {
  const box = table.parentElement;
  table.hidden = false;
  const wide = PHONE.matches && table.scrollWidth > box.clientWidth + 1;
  if (wide && !table.folded) {
    table.folded = folded(table);
    table.after(table.folded);
  }
  table.hidden = wide;
  if (table.folded) table.folded.hidden = !wide;
}

function fitAll() {
  document.querySelectorAll(".bd-article table:is(.table, .dataframe)").forEach((table) => {
    if (table.closest("details:not([open]), .explorer") === null) fit(table);
  });
}

window.addEventListener("load", () => {
  fitAll();
  /* A table inside of a closed box has no width until it is opened. */
  document.querySelectorAll(".bd-article details").forEach((box) => box.addEventListener("toggle", fitAll));
});
window.addEventListener("resize", fitAll);
