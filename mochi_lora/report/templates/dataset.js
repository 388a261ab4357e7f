
"use strict";
const all = document.getElementById("all");
const clips = all ? [...all.children] : [];
const choose = document.getElementById("choose");
const [search, mark, shape, sort, count] = ["search", "mark", "shape", "sort", "count"].map((id) => document.getElementById(id));

function show() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  let left = 0;
  for (const clip of clips) {
    const { marks, words: text, shape: its } = clip.dataset;
    const fits = (!mark.value || marks.includes(`|${mark.value}|`)) && (!shape?.value || its === shape.value);
    clip.hidden = !(fits && words.every((word) => text.includes(word)));
    left += Number(!clip.hidden);
  }
  count.textContent = left === clips.length ? `${left} clips` : `${left} of ${clips.length} clips`;
}

function order() {
  const name = sort.value;
  // What was not measured stands at the end; the largest first, names as they come.
  const value = (clip) => (clip.dataset[name] === "" ? -Infinity : Number(clip.dataset[name]));
  const sign = name === "order" ? 1 : -1;
  const before = (a, b) => sign * (value(a) - value(b)) || a.dataset.order - b.dataset.order;
  all.append(...[...clips].sort(before));
}

if (choose) {
  choose.hidden = false;
  choose.addEventListener("submit", (event) => event.preventDefault());
  search.addEventListener("input", show);
  mark.addEventListener("change", show);
  shape?.addEventListener("change", show);
  sort.addEventListener("change", order);
  for (const pick of document.querySelectorAll(".pick")) {
    pick.hidden = false;
    pick.addEventListener("click", () => {
      mark.value = pick.dataset.mark;
      show();
      document.getElementById("clips").scrollIntoView();
    });
  }
  show();
}

// A link into a folded part opens it; folded parts must be on paper too.
for (const link of document.querySelectorAll('a[href="#left-out"]')) {
  link.addEventListener("click", () => {
    for (const part of document.querySelectorAll("details")) part.open = true;
  });
}
addEventListener("beforeprint", () => {
  for (const part of document.querySelectorAll("details")) part.open = true;
});
