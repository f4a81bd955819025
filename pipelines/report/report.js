"use strict";
// The protected picture gives place to the original, where a change is easiest to see: once, or again and again.
const timers = new WeakMap();
const put = (figure, original) => {
  const [before, after] = figure.querySelectorAll("img"), label = after.nextElementSibling;
  if (!after.dataset.src) Object.assign(after.dataset, { src: after.src, alt: after.alt, label: label.textContent });
  after.src = original ? before.src : after.dataset.src;
  after.alt = original ? before.alt : after.dataset.alt;
  label.textContent = original ? before.nextElementSibling.textContent : after.dataset.label;
  figure.dataset.original = original ? "1" : "";
};
const press = (button, on) => button.setAttribute("aria-pressed", String(on));
const still = (figure) => {
  clearInterval(timers.get(figure));
  timers.delete(figure);
  for (const button of figure.querySelectorAll("[aria-pressed]")) press(button, false);
};
// A photo's pixel is one pixel of the screen, or 2 x 2, or 3 x 3 of them.
const size = (image, zoom) => {
  image.dataset.width ||= image.getAttribute("width");
  image.dataset.height ||= image.getAttribute("height");
  image.style.width = `${image.dataset.width * zoom / devicePixelRatio}px`;
  image.style.height = `${image.dataset.height * zoom / devicePixelRatio}px`;
  image.dataset.zoom = zoom;
};
const sizes = () => {
  for (const image of document.querySelectorAll("img.own")) size(image, Number(image.dataset.zoom) || 1);
};
addEventListener("resize", sizes); // also where the window moves to a screen of another ratio
sizes();
const acts = {
  blink(button, figure) {
    const on = !timers.has(figure);
    still(figure);
    put(figure, on);
    press(button, on);
    if (on) timers.set(figure, setInterval(() => put(figure, !figure.dataset.original), 700));
  },
  original(button, figure) {
    const on = button.getAttribute("aria-pressed") !== "true";
    still(figure);
    put(figure, on);
    press(button, on);
  },
  zoom(button, figure) {
    const zoom = Number(button.querySelector("span").textContent) % 3 + 1;
    for (const image of figure.querySelectorAll("img.own")) size(image, zoom);
    button.querySelector("span").textContent = zoom;
  },
};
document.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-do]");
  if (!button) return;
  const act = acts[button.dataset.do];
  if (act) act(button, button.closest("figure"));
  else for (const fold of button.closest("section").querySelectorAll("details")) fold.open = button.dataset.do === "open";
});
// Paper cannot unfold.
let closed = [];
addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll("details:not([open])")];
  for (const fold of closed) fold.open = true;
});
addEventListener("afterprint", () => { for (const fold of closed) fold.open = false; });
