"use strict";
// Shows pairs, asks, and gives the answers as a file. It knows no more than the page does: which is which is not in it.
(() => {
  const $ = (id) => document.getElementById(id);
  const { page, version } = document.body.dataset;
  const pairs = [...$("pairs").children].map((e) => e.dataset);
  const form = $("form"), shelf = `scol-viewer-${page}`;
  const random = () => [...crypto.getRandomValues(new Uint8Array(8))].map((v) => v.toString(16).padStart(2, "0")).join("");
  const fresh = () => ({ session: random(), viewer: "", at: 0, answers: {} });
  let state = fresh();
  let zoom = 1, shown = "left", mode = "side", timer = 0, picture = null;

  // A browser may refuse to keep anything for a page that is a file.
  const keep = () => { try { localStorage.setItem(shelf, JSON.stringify(state)); } catch { /* the answers stay in the page */ } };
  const recall = () => {
    try {
      const old = JSON.parse(localStorage.getItem(shelf));
      if (old && old.answers && typeof old.session === "string") { state = { ...state, ...old }; return true; }
    } catch { /* nothing is kept here */ }
    return false;
  };

  const only = (id) => { for (const name of ["start", "trial", "end"]) $(name).hidden = name !== id; };
  const known = () => pairs.filter((p) => state.answers[p.id]);

  // ---- pictures ----
  // One pixel of the photo is one pixel of the screen, or 2 x 2 of them: whatever the screen's ratio, nothing is resampled.
  const paint = (canvas, side) => {
    const pair = pairs[state.at], width = +pair.width, height = +pair.height, ratio = window.devicePixelRatio || 1;
    canvas.width = width * zoom; canvas.height = height * zoom;
    canvas.style.width = `${width * zoom / ratio}px`; canvas.style.height = `${height * zoom / ratio}px`;
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    context.drawImage(picture, side === "left" ? 0 : width, 0, width, height, 0, 0, width * zoom, height * zoom);
  };
  const draw = () => {
    if (!picture) return;
    $("one").hidden = $("two").hidden = mode !== "side";
    $("place").hidden = mode === "side";
    if (mode === "side") { paint($("one").firstChild, "left"); paint($("two").firstChild, "right"); }
    else { paint($("place").firstChild, shown); $("place").lastChild.textContent = shown; }
    for (const name of ["side", "flicker", "turn"]) {
      document.querySelector(`[data-do=${name}]`).setAttribute("aria-pressed", String(mode === name));
    }
    document.querySelector("[data-do=zoom]").setAttribute("aria-pressed", String(zoom === 2));
  };
  const other = () => { shown = shown === "left" ? "right" : "left"; draw(); };
  const view = (name) => {
    clearInterval(timer);
    const turned = mode === "turn" && name === "turn";
    mode = name;
    if (name === "flicker") timer = setInterval(other, 1000);
    turned ? other() : draw();
  };

  // ---- pairs ----
  const show = (at) => {
    state.at = Math.max(0, Math.min(at, pairs.length - 1));
    const pair = pairs[state.at], answer = state.answers[pair.id];
    form.reset();
    if (answer) {
      for (const [name, value] of Object.entries(answer)) {
        const word = name === "publish" ? { true: "yes", false: "no" }[value] : String(value);
        const field = word && form.querySelector(`[name=${name}][value="${word}"]`);
        if (field) field.checked = true;
      }
    }
    $("said").textContent = "";
    $("where").textContent = `Pair ${state.at + 1} of ${pairs.length}`;
    $("progress").value = known().length;
    shown = "left"; picture = null;
    delete $("stage").dataset.pair; // the last pair must not be taken for this one
    clearInterval(timer); mode = "side";
    const image = new Image();
    image.onload = () => { if (pairs[state.at] === pair) { picture = image; draw(); $("stage").dataset.pair = pair.id; } };
    image.onerror = () => { $("said").textContent = "This pair cannot be shown; go on with the next one."; };
    image.src = pair.picture;
    only("trial");
    $("where").focus();
  };
  const take = () => {
    const given = new FormData(form), original = given.get("original"), score = given.get("score");
    if (!original || !score) return false;
    const publish = given.get("publish");
    state.answers[pairs[state.at].id] = { original, score: +score, publish: publish ? publish === "yes" : null };
    keep();
    return true;
  };
  const next = () => {
    if (!take()) { $("said").textContent = "Please answer the first two questions."; return; }
    if (state.at + 1 < pairs.length) show(state.at + 1); else finish();
    keep();
  };

  // ---- the end ----
  const answers = () => JSON.stringify({
    version: +version, page, session: state.session, viewer: state.viewer, written: new Date().toISOString(),
    answers: Object.fromEntries(known().map((p) => [p.id, state.answers[p.id]])),
  }, null, 1);
  const finish = () => {
    clearInterval(timer);
    take();
    const given = known().map((p) => state.answers[p.id]);
    const count = (name, value) => given.filter((a) => a[name] === value).length;
    const lines = [
      `${given.length} of ${pairs.length} pairs answered`,
      `original: ${count("original", "left")} left, ${count("original", "right")} right, ${count("original", "unsure")} not sure`,
      `steps: ${[5, 4, 3, 2, 1].map((s) => `${s}: ${count("score", s)}`).join(", ")}`,
      `would publish: ${count("publish", true)} yes, ${count("publish", false)} no`,
    ];
    $("counts").replaceChildren(...lines.map((words) => { const e = document.createElement("li"); e.textContent = words; return e; }));
    $("text").value = answers();
    only("end");
    $("thanks").focus();
  };
  const download = () => {
    const name = state.viewer.normalize("NFKD").replace(/[^A-Za-z0-9]+/g, "-").replace(/^-|-$/g, "") || "anonymous";
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([answers() + "\n"], { type: "application/json" }));
    link.download = `viewer-answers-${name}.json`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  };

  // ---- what is pressed ----
  const acts = {
    begin: () => { state.viewer = $("viewer").value.trim(); keep(); show(state.at); },
    side: () => view("side"), flicker: () => view("flicker"), turn: () => view("turn"),
    zoom: () => { zoom = 3 - zoom; draw(); },
    back: () => { take(); if (state.at > 0) show(state.at - 1); },
    anew: () => { state = fresh(); keep(); $("viewer").value = ""; $("kept").hidden = true; $("viewer").focus(); },
    finish, download, return: () => show(state.at),
  };
  const keys = { s: "side", f: "flicker", t: "turn", z: "zoom", b: "back" };
  const fields = {
    l: ["original", "left"], r: ["original", "right"], u: ["original", "unsure"], y: ["publish", "yes"], n: ["publish", "no"],
    ...Object.fromEntries([1, 2, 3, 4, 5].map((s) => [String(s), ["score", String(s)]])),
  };
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-do]");
    if (!button) return;
    acts[button.dataset.do]();
    if (event.detail && !$("trial").hidden) $("where").focus({ preventScroll: true }); // a mouse: Enter goes on, presses nothing
  });
  form.addEventListener("submit", (event) => { event.preventDefault(); next(); });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    if (!$("start").hidden && event.key === "Enter" && event.target === $("viewer")) { acts.begin(); event.preventDefault(); return; }
    if ($("trial").hidden) return;
    const key = event.key.toLowerCase();
    if (key === "enter") {
      if (event.target.closest("button")) return; // it presses that button
      event.preventDefault();
      next();
    } else if (keys[key]) acts[keys[key]]();
    else if (fields[key]) form.querySelector(`[name=${fields[key][0]}][value="${fields[key][1]}"]`).checked = true;
  });
  addEventListener("resize", draw); // also when the window moves to a screen of another ratio

  if (recall() && known().length) {
    $("kept").hidden = false;
    $("kept").firstChild.textContent = `${known().length} answers of ${state.viewer || "somebody"} are kept from before.`;
  }
  $("viewer").value = state.viewer;
  only("start");
})();
