"use strict";
// Tables sort by their headings.
for (const table of document.querySelectorAll("table[data-sorts]")) {
  table.querySelectorAll("thead th[data-by]").forEach((head) => {
    head.querySelector("button").addEventListener("click", () => {
      const rising = head.getAttribute("aria-sort") !== "ascending";
      table.querySelectorAll("thead th[aria-sort]").forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", rising ? "ascending" : "descending");
      const body = table.querySelector("tbody.rows"), by = head.dataset.by;
      const value = (row) => (by === "name" ? row.dataset.name : Number(row.dataset[by]));
      [...body.rows]
        .sort((a, b) => (value(a) < value(b) ? -1 : value(a) > value(b) ? 1 : 0) * (rising ? 1 : -1))
        .forEach((row) => body.append(row));
    });
  });
}
// A class picked under a case stands out in its slices.
for (const keys of document.querySelectorAll(".keys")) {
  keys.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const panel = keys.closest(".case"), on = button.getAttribute("aria-pressed") !== "true";
    keys.querySelectorAll("button").forEach((other) => other.setAttribute("aria-pressed", "false"));
    button.setAttribute("aria-pressed", String(on));
    panel.classList.toggle("picked", on);
    panel.querySelectorAll(".pane path").forEach((path) => path.classList.toggle("on", on && path.dataset.k === button.dataset.k));
  });
}
// A slice fills the window when it is asked to.
const dialog = document.getElementById("zoom");
const enlarge = (svg) => {
  const copy = svg.cloneNode(true);
  const image = copy.querySelector("image");
  if (image) image.removeAttribute("id");
  copy.removeAttribute("tabindex");
  dialog.replaceChildren(copy);
  dialog.showModal();
};
for (const svg of document.querySelectorAll(".pane svg")) {
  svg.addEventListener("click", () => enlarge(svg));
  svg.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); enlarge(svg); }
  });
}
dialog.addEventListener("click", () => dialog.close());
// The contents say where one is.
const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    links.forEach((link) => link.removeAttribute("aria-current"));
    const link = links.get(entry.target.id);
    if (link) {
      link.setAttribute("aria-current", "true");
      const strip = link.closest("nav");
      if (strip.scrollWidth > strip.clientWidth) strip.scrollLeft = link.offsetLeft - 16;
    }
  }
}, { rootMargin: "-10% 0px -80% 0px" });
document.querySelectorAll("main > section").forEach((section) => seen.observe(section));
// Paper unfolds nothing by itself.
addEventListener("beforeprint", () => document.querySelectorAll("td details").forEach((each) => { each.open = true; }));
