"use strict";
// Blink: the protected picture gives place to the original, where a change is easiest to see.
document.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-do]");
  if (!button) return;
  if (button.dataset.do === "blink") {
    const [before, after] = button.closest("figure").querySelectorAll("img");
    const on = button.getAttribute("aria-pressed") !== "true";
    if (!after.dataset.src) { after.dataset.src = after.src; after.dataset.alt = after.alt; }
    after.src = on ? before.src : after.dataset.src;
    after.alt = on ? before.alt : after.dataset.alt;
    button.setAttribute("aria-pressed", String(on));
  } else {
    for (const fold of button.closest("section").querySelectorAll("details")) fold.open = button.dataset.do === "open";
  }
});
// Paper cannot unfold.
let closed = [];
addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll("details:not([open])")];
  for (const fold of closed) fold.open = true;
});
addEventListener("afterprint", () => { for (const fold of closed) fold.open = false; });
