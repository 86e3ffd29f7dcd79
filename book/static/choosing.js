"use strict";
// The plot of a table: one point for each of its rows that the filters leave.
const NS = "http://www.w3.org/2000/svg";
const make = (name, attributes, parent, text) => {
  const element = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return parent.appendChild(element);
};

for (const box of document.querySelectorAll(".choosing")) {
  const rows = [...box.querySelectorAll("tbody tr")];
  const svg = box.querySelector("svg"), form = box.querySelector("form");
  const width = 760, height = 430, left = 52, right = 24, top = 16, bottom = 44;

  const draw = () => {
    const field = form.elements.x.value;
    const kinds = new Set([...form.querySelectorAll("[name=kind]:checked")].map((input) => input.value));
    for (const row of rows) row.hidden = !kinds.has(row.dataset.kind);
    const shown = rows.filter((row) => !row.hidden);
    svg.replaceChildren();
    form.querySelector("output").textContent = `${shown.length} of ${rows.length}`;
    if (!shown.length) return;
    const value = (row) => Number(row.dataset[field]), after = (row) => Number(row.dataset.after);
    const logs = rows.map((row) => Math.log10(value(row)));
    const [low, high] = [Math.min(...logs) - 0.08, Math.max(...logs) + 0.08];
    const x = (v) => left + (Math.log10(v) - low) / (high - low) * (width - left - right);
    const y = (v) => top + (1 - v) * (height - top - bottom);
    for (let percent = 0; percent <= 100; percent += 20) {
      make("line", { x1: left, x2: width - right, y1: y(percent / 100), y2: y(percent / 100), class: "grid" }, svg);
      make("text", { x: left - 8, y: y(percent / 100) + 4, "text-anchor": "end", class: "tick" }, svg, `${percent}%`);
    }
    for (let power = Math.floor(low); power <= high; power += 1) {
      for (const factor of high - low < 1.6 ? [1, 2, 5] : high - low < 2.6 ? [1, 3] : [1]) {
        const tick = factor * 10 ** power;
        if (Math.log10(tick) < low || Math.log10(tick) > high) continue;
        make("line", { x1: x(tick), x2: x(tick), y1: top, y2: height - bottom, class: "grid" }, svg);
        make("text", { x: x(tick), y: height - bottom + 18, "text-anchor": "middle", class: "tick" }, svg,
             tick.toLocaleString("en-US"));
      }
    }
    const label = form.elements.x.selectedOptions[0].textContent;
    make("text", { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle", class: "axis" }, svg, label);
    const taken = [];
    for (const row of [...shown].sort((a, b) => after(b) - after(a))) {
      const cx = x(value(row)), cy = y(after(row)), name = row.dataset.name;
      const point = make("g", { class: "point", "data-name": name }, svg);
      make("circle", { cx, cy, r: 4 }, point);
      make("title", {}, point, `${name}: ${(100 * after(row)).toFixed(1)}%, ${value(row).toLocaleString("en-US")}`);
      const wide = name.length * 6.8, end = cx + wide + 10 > width;
      const area = { a: end ? cx - wide - 8 : cx + 7, b: end ? cx - 8 : cx + wide + 7, c: cy - 6, d: cy + 6 };
      const free = !taken.some((t) => t.a < area.b && area.a < t.b && t.c < area.d && area.c < t.d);
      if (free) taken.push(area);
      taken.push({ a: cx - 4, b: cx + 4, c: cy - 4, d: cy + 4 });
      make("text", { x: end ? cx - 7 : cx + 7, y: cy + 4, "text-anchor": end ? "end" : "start",
                     class: free ? "name" : "name crowded" }, point, name);
    }
  };

  const mark = (name) => {
    for (const point of svg.querySelectorAll(".point")) point.classList.toggle("on", point.dataset.name === name);
    for (const row of rows) row.classList.toggle("on", row.dataset.name === name);
    const on = svg.querySelector(".point.on");
    if (on) svg.appendChild(on);
  };
  for (const row of rows) {
    row.addEventListener("mouseenter", () => mark(row.dataset.name));
    row.addEventListener("focusin", () => mark(row.dataset.name));
  }
  svg.addEventListener("mouseover", (event) => {
    const point = event.target.closest(".point");
    if (point) mark(point.dataset.name);
  });

  for (const [number, heading] of [...box.querySelectorAll("thead button")].entries()) {
    heading.addEventListener("click", () => {
      const cell = heading.closest("th"), down = cell.getAttribute("aria-sort") === "descending";
      for (const other of box.querySelectorAll("th")) other.removeAttribute("aria-sort");
      cell.setAttribute("aria-sort", down ? "ascending" : "descending");
      const read = (row) => heading.dataset.field === "name" ? row.dataset.name.toLowerCase()
        : Number(row.dataset[heading.dataset.field]);
      rows.sort((a, b) => (read(a) < read(b) ? 1 : -1) * (down ? -1 : 1));
      box.querySelector("tbody").append(...rows);
    });
  }
  form.addEventListener("input", draw);
  form.addEventListener("submit", (event) => event.preventDefault());
  draw();
}
