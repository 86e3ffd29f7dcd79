"use strict";
// The theme, the menu of small screens, and the filter of the contents.
const root = document.documentElement;
const remembered = { get: () => { try { return localStorage.getItem("theme"); } catch { return null; } },
                     set: (v) => { try { localStorage.setItem("theme", v); } catch { /* files may keep nothing */ } } };
if (remembered.get()) root.dataset.theme = remembered.get();

document.addEventListener("DOMContentLoaded", () => {
  document.getElementById("theme").addEventListener("click", () => {
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const now = root.dataset.theme || (dark ? "dark" : "light");
    root.dataset.theme = now === "dark" ? "light" : "dark";
    remembered.set(root.dataset.theme);
  });

  if (!document.getElementById("sidebar")) return; // a page of code has none
  const menu = document.getElementById("menu"), sidebar = document.getElementById("sidebar");
  const open = (yes) => { sidebar.classList.toggle("open", yes); menu.setAttribute("aria-expanded", yes); };
  menu.addEventListener("click", () => open(!sidebar.classList.contains("open")));
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") open(false);
    if (event.key === "/" && !/INPUT|TEXTAREA|SELECT/.test(document.activeElement.tagName)) {
      event.preventDefault(); open(true); find.focus();
    }
  });

  const find = document.getElementById("find"), found = document.getElementById("found");
  find.addEventListener("input", () => {
    const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const item of sidebar.querySelectorAll("li")) {
      item.hidden = !words.every((word) => item.dataset.words.includes(word));
      shown += !item.hidden;
    }
    for (const section of sidebar.querySelectorAll("section")) {
      section.hidden = !section.querySelector("li:not([hidden])");
    }
    found.textContent = words.length ? `${shown} ${shown === 1 ? "page" : "pages"}` : "";
  });
  find.addEventListener("keydown", (event) => {
    const first = sidebar.querySelector("li:not([hidden]) a");
    if (event.key === "Enter" && first) first.click();
  });
  const here = sidebar.querySelector("[aria-current]");
  if (here && matchMedia("(min-width: 60rem)").matches) sidebar.scrollTop = here.offsetTop - sidebar.clientHeight / 2;
});
