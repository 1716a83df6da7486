"use strict";
(() => {
  const table = document.getElementById("layers");
  if (!table) return;
  const body = table.tBodies[0];
  const of = (id) => document.getElementById(id);
  const show = () => {
    const condition = of("condition").value, measure = of("measure").value;
    for (const row of body.rows) row.hidden = row.dataset.condition !== condition || row.dataset.measure !== measure;
    table.classList.toggle("no-bands", !of("bands").checked);
    // mse grows with energy and with the number of modes: it is never shown without them.
    table.classList.toggle("no-side", !of("side").checked && !measure.startsWith("mse"));
  };
  for (const id of ["condition", "measure", "bands", "side"]) of(id).addEventListener("change", show);
  of("controls").hidden = false;
  show();
  const key = (row, column) => {
    const cell = row.cells[column], value = cell.dataset.value;
    return value === "" || isNaN(value) ? cell.textContent.trim() : Number(value);
  };
  const compare = (a, b) =>
    typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? -1 : 1;
  table.tHead.addEventListener("click", (event) => {
    const head = event.target.closest("th");
    if (!head) return;
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const rows = Array.from(body.rows);
    rows.sort((a, b) => (up ? 1 : -1) * compare(key(a, head.cellIndex), key(b, head.cellIndex)));
    body.append(...rows);
  });
})();
