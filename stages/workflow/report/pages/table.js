// Tables that sort by the column whose head is pressed: numbers as numbers, what has none last.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  const value = (row, at) => row.cells[at].dataset.value ?? row.cells[at].textContent.trim();
  heads.forEach((head, at) => head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    const rows = [...body.rows], numbers = rows.every(row => ["", "-"].includes(value(row, at)) || !isNaN(value(row, at)));
    const empty = row => ["", "-"].includes(value(row, at));
    rows.sort((a, b) => empty(a) - empty(b) || (up ? 1 : -1) * (numbers ? value(a, at) - value(b, at) : value(a, at).localeCompare(value(b, at))));
    body.append(...rows);
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
  }));
}
