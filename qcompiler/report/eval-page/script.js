"use strict";
(() => {
  const root = document.documentElement, system = matchMedia("(prefers-color-scheme: dark)");
  const follow = () => { root.dataset.theme = system.matches ? "dark" : "light"; };
  follow();
  system.addEventListener("change", follow);
  document.getElementById("theme").addEventListener("click", () => {
    root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
  });
  for (const block of document.querySelectorAll(".table")) {
    const body = block.querySelector("tbody"), rows = [...body.rows], heads = [...block.querySelectorAll("th")];
    const search = block.querySelector("input"), shown = block.querySelector(".shown");
    rows.forEach((row, place) => { row.dataset.place = place; });
    const filter = () => {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      let count = 0;
      for (const row of rows) {
        const text = row.innerText.toLowerCase(), hit = words.every(word => text.includes(word));
        row.hidden = !hit;
        count += hit;
      }
      shown.textContent = `${count} of ${rows.length}`;
    };
    search.addEventListener("input", filter);
    const value = (row, column) => {
      const cell = row.cells[column], text = cell.dataset.v;
      return text === undefined ? cell.innerText.toLowerCase() : text === "" ? NaN : Number(text);
    };
    heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
      const now = head.getAttribute("aria-sort"), numbers = head.classList.contains("n");
      const down = now ? now === "ascending" : numbers;
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      rows.sort((a, b) => {
        const x = value(a, column), y = value(b, column), none = Number.isNaN(x) - Number.isNaN(y);
        const order = x < y ? -1 : x > y ? 1 : 0;
        return none || (down ? -order : order) || a.dataset.place - b.dataset.place;
      });
      body.append(...rows);
    }));
    filter();
  }
})();
