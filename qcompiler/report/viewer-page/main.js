// ---- putting it together: timeline, tabs, keys, mouse ----
const TABS = { node: ["Node", nodePanel], changes: ["Changes", changesPanel], pass: ["Pass", passPanel] };
const MODES = ["precision", "error", "pass", "plain"];
let tab = "pass", found = [], foundAt = -1;
const searchBox = document.getElementById("search"), results = document.getElementById("results");

function showPanel() {
  panel.replaceChildren(...TABS[tab][1]());
  panel.scrollTop = 0;
  for (const button of document.getElementById("tabs").children) button.setAttribute("aria-selected", button.dataset.tab === tab);
}

function setTab(name) { tab = name; showPanel(); }

function setStage(n) {
  if (n < 0 || n >= stages.length) return;
  const old = graphShown(), first = old === null;
  const anchor = shown.selected !== null && old ? old.byName.get(shown.selected) : undefined;
  const place = anchor === undefined ? middleNode(old) : anchor;
  const name = place === undefined ? null : old.nodes[place][NAME], was = place === undefined ? null : frame(old.frames, place);
  shown.stage = n;
  shown.before = false;
  const graph = graphShown(), now = graph && name !== null ? graph.byName.get(name) : undefined;
  // What the eye was on stays where it was.
  if (now !== undefined) {
    const [x, y] = frame(graph.frames, now);
    view.x += (was[0] - x) * view.k;
    view.y += (was[1] - y) * view.k;
    redraw();
  } else if (first || graph !== old) home();
  [...document.getElementById("timeline").children].forEach((row, i) => row.classList.toggle("at", i === n));
  document.getElementById("timeline").children[n].scrollIntoView({ block: "nearest" });
  refresh();
}

function middleNode(graph) {
  if (!graph || !graph.nodes.length) return undefined;
  const y = (canvas.clientHeight / 2 - view.y) / view.k, x = (canvas.clientWidth / 2 - view.x) / view.k;
  let best, least = Infinity;
  graph.nodes.forEach((_, i) => {
    const [l, t, w, h] = frame(graph.frames, i), d = Math.hypot(l + w / 2 - x, t + h / 2 - y);
    if (d < least) { least = d; best = i; }
  });
  return best;
}

function refresh() {
  colours.key = "";
  status();
  legend();
  if (searchBox.value) runSearch(false);
  showPanel();
  redraw();
}

function setBefore(on) {
  if (on === shown.before || (on && !graphOf(shown.stage - 1))) return;
  shown.before = on;
  refresh();
}

function setMode(mode) {
  shown.mode = mode;
  for (const button of document.getElementById("modes").children) button.setAttribute("aria-checked", button.dataset.mode === mode);
  colours.key = "";
  legend();
  redraw();
}

function select(name, follow) {
  shown.selected = name;
  if (name !== null) tab = "node";
  const graph = graphShown(), i = graph && name !== null ? graph.byName.get(name) : undefined;
  if (follow && i !== undefined && !visible(i)) centre(i);
  showPanel();
  redraw();
}

function status() {
  const graph = graphShown(), made = difference(shown.stage);
  const text = `${stageOfGraph()} ${stageLabel(stageOfGraph())}${shown.before ? " (before)" : ""}: ` + (graph ? `${graph.nodes.length} boxes, ${graph.edges.length} edges` : stages[shown.stage].problem || "no graph");
  document.getElementById("status").textContent = text + (made.added.size + made.changed.size + made.removed.size ? `, +${made.added.size} ~${made.changed.size} \u2212${made.removed.size}` : "");
}

function legend() {
  const graph = graphShown(), entries = [];
  if (graph && shown.mode === "precision") {
    const used = new Set(graph.nodes.map(node => core.precisions[node[PRECISION]]));
    for (const name of core.precisions) if (used.has(name)) entries.push([PRECISION_COLOURS[name], PRECISION_TEXT[name]]);
    entries.push([null, "pale: only converts"]);
  } else if (graph && shown.mode === "error") {
    const kinds = new Set(graph.nodes.map((_, i) => errorOf(stageOfGraph(), graph, i)).filter(Boolean).map(e => e.kind));
    for (const [low] of RAMP) entries.push([errorColour(low), `${low} dB`]);
    entries.push([theme.faint, kinds.size ? "not known" : "this dump has no error figures (opt --numerics makes them)"]);
    if (kinds.has("expected")) entries.push([null, kinds.has("measured") ? "measured, else expected from histograms" : "SQNR expected from the observed histograms"]);
    else if (kinds.size) entries.push([null, "least SQNR any pass so far made at the value"]);
  } else if (graph && shown.mode === "pass") {
    const counts = new Map();
    for (const node of graph.nodes) { const n = touchedBy(stageOfGraph()).get(node[NAME]); if (n !== undefined) counts.set(n, (counts.get(n) || 0) + 1); }
    for (const n of [...counts.keys()].sort((a, b) => a - b)) entries.push([passColour(n), `${stageLabel(n)} (${counts.get(n)})`]);
    entries.push([theme.faint, "as imported"]);
  }
  const made = difference(shown.stage);
  if (!shown.before && made.added.size) entries.push([theme.added, "ring: added here"]);
  if (made.changed.size) entries.push([theme.changed, "ring: changed here"]);
  if (shown.before && made.removed.size) entries.push([theme.removed, "ring: removed here"]);
  document.getElementById("legend").replaceChildren(...entries.map(([colour, text]) => el("span", {}, colour ? el("i", { style: `background:${colour}` }) : null, text)));
}

// ---- search ----
function runSearch(open) {
  const graph = graphShown();
  found = search(graph, searchBox.value);
  foundAt = -1;
  shown.matchNames = new Set(found.map(i => graph.nodes[i][NAME]));
  document.getElementById("count").textContent = searchBox.value ? String(found.length) : "";
  results.replaceChildren(...found.slice(0, 60).map((i, at) => el("div", { role: "option", onmousedown: event => { event.preventDefault(); pick(at); results.classList.remove("open"); } }, `${graph.nodes[i][NAME]}  \u00b7  ${graph.nodes[i][OP]}`)));
  results.classList.toggle("open", open && found.length > 0);
  redraw();
}

function pick(at) {
  if (!found.length) return;
  foundAt = (at + found.length) % found.length;
  [...results.children].forEach((row, i) => row.classList.toggle("at", i === foundAt));
  if (results.children[foundAt]) results.children[foundAt].scrollIntoView({ block: "nearest" });
  select(graphShown().nodes[found[foundAt]][NAME], true);
  document.getElementById("count").textContent = `${foundAt + 1}/${found.length}`;
}

searchBox.addEventListener("input", () => runSearch(true));
searchBox.addEventListener("blur", () => results.classList.remove("open"));
searchBox.addEventListener("keydown", event => {
  if (event.key === "Enter") pick(foundAt + (event.shiftKey ? -1 : 1));
  else if (event.key === "ArrowDown") { event.preventDefault(); pick(foundAt + 1); }
  else if (event.key === "ArrowUp") { event.preventDefault(); pick(foundAt - 1); }
  else if (event.key === "Escape") { if (!results.classList.contains("open")) { searchBox.value = ""; runSearch(false); } results.classList.remove("open"); canvas.focus(); }
  else return;
  event.stopPropagation();
});

// ---- mouse ----
let drag = null;
canvas.addEventListener("pointerdown", event => { drag = { x: event.clientX, y: event.clientY, moved: false }; canvas.setPointerCapture(event.pointerId); canvas.classList.add("drag"); canvas.focus({ preventScroll: true }); });
canvas.addEventListener("pointermove", event => {
  if (drag) {
    const dx = event.clientX - drag.x, dy = event.clientY - drag.y;
    if (!drag.moved && Math.hypot(dx, dy) < 4) return;
    drag = { x: event.clientX, y: event.clientY, moved: true };
    view.x += dx;
    view.y += dy;
    redraw();
    return;
  }
  const i = nodeAt(event.offsetX, event.offsetY), name = i === null ? null : graphShown().nodes[i][NAME];
  if (name !== shown.hover) { shown.hover = name; redraw(); }
  tip(i, event.offsetX, event.offsetY);
});
canvas.addEventListener("pointerup", event => {
  canvas.classList.remove("drag");
  const clicked = drag && !drag.moved;
  drag = null;
  if (clicked) { const i = nodeAt(event.offsetX, event.offsetY); select(i === null ? null : graphShown().nodes[i][NAME], false); }
});
canvas.addEventListener("pointerleave", () => { document.getElementById("tip").style.display = "none"; });
canvas.addEventListener("wheel", event => {
  event.preventDefault();
  const unit = event.deltaMode === 1 ? 16 : 1;
  if (event.ctrlKey || event.metaKey || !event.shiftKey) zoom(Math.exp(-event.deltaY * unit * (event.ctrlKey ? 0.01 : 0.0015)), event.offsetX, event.offsetY);
  else { view.x -= (event.deltaX + event.deltaY) * unit; redraw(); }
}, { passive: false });
canvas.addEventListener("dblclick", event => { const i = nodeAt(event.offsetX, event.offsetY); if (i !== null) centre(i, 1); else zoom(1.6, event.offsetX, event.offsetY); });

function tip(i, x, y) {
  const box = document.getElementById("tip");
  if (i === null) { box.style.display = "none"; return; }
  const graph = graphShown(), node = graph.nodes[i], error = errorOf(stageOfGraph(), graph, i);
  const last = touchedBy(stageOfGraph()).get(node[NAME]);
  box.textContent = [`${node[NAME]}  (${node[OP]})`, node[TYPES].join(", "), error ? `${dbText(error.db)} ${error.kind}` : "", last === undefined ? "" : `last touched by ${stageLabel(last)}`].filter(Boolean).join("  \u00b7  ");
  box.style.display = "block";
  box.style.left = Math.min(x + 14, canvas.clientWidth - Math.min(box.offsetWidth, 520) - 6) + "px";
  box.style.top = y + 18 + "px";
}

let mapping = false;
const mapTo = event => {
  view.x = canvas.clientWidth / 2 - (event.offsetX / overview.sx) * view.k;
  view.y = canvas.clientHeight / 2 - (event.offsetY / overview.sy) * view.k;
  redraw();
};
mapCanvas.addEventListener("pointerdown", event => { mapping = true; mapCanvas.setPointerCapture(event.pointerId); mapTo(event); });
mapCanvas.addEventListener("pointermove", event => { if (mapping) mapTo(event); });
mapCanvas.addEventListener("pointerup", () => { mapping = false; });

// ---- keys ----
const KEYS = [
  ["/", "search; Enter, Shift+Enter: next, previous"], ["n  N", "next, previous match"], ["[  ]", "previous, next pass"], ["b", "graph before this pass"],
  ["1  2  3", "node, changes, pass"], ["c", "colour by the next thing"], ["u  j", "to the first input, the first reader"], ["f", "fit all"], ["h", "top of the graph"],
  ["+  \u2212", "zoom"], ["arrows", "move"], ["Esc", "clear"], ["?", "this list"],
];
const middle = () => [canvas.clientWidth / 2, canvas.clientHeight / 2];
const move = (dx, dy) => { view.x += dx; view.y += dy; redraw(); };
function walk(side) {
  const graph = graphShown(), i = graph && shown.selected !== null ? graph.byName.get(shown.selected) : undefined;
  if (i !== undefined && graph[side][i].length) select(graph.nodes[graph[side][i][0]][NAME], true);
}
const ACTIONS = {
  "/": () => { searchBox.focus(); searchBox.select(); }, n: () => pick(foundAt + 1), N: () => pick(foundAt - 1), "[": () => setStage(shown.stage - 1),
  "]": () => setStage(shown.stage + 1), b: () => setBefore(!shown.before), 1: () => setTab("node"), 2: () => setTab("changes"), 3: () => setTab("pass"),
  c: () => setMode(MODES[(MODES.indexOf(shown.mode) + 1) % MODES.length]), u: () => walk("sources"), j: () => walk("readers"), f: fit, h: home,
  "+": () => zoom(1.25, ...middle()), "=": () => zoom(1.25, ...middle()), "-": () => zoom(0.8, ...middle()), ArrowLeft: () => move(80, 0), ArrowRight: () => move(-80, 0),
  ArrowUp: () => move(0, 80), ArrowDown: () => move(0, -80), PageUp: () => move(0, canvas.clientHeight * 0.8), PageDown: () => move(0, -canvas.clientHeight * 0.8),
  Escape: () => { document.getElementById("keys").hidden = true; searchBox.value = ""; runSearch(false); select(null, false); },
  "?": () => { const box = document.getElementById("keys"); box.hidden = !box.hidden; },
};
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target === searchBox) return;
  const action = ACTIONS[event.key];
  if (action) { event.preventDefault(); action(); }
});

// ---- start ----
function timeline() {
  const slowest = Math.max(...stages.map(s => s.seconds || 0), 1e-9);
  document.getElementById("timeline").replaceChildren(...stages.map((stage, n) => {
    const more = [], delta = stage.delta;
    if (delta && delta[0]) more.push(el("span", { class: "plus" }, `+${delta[0]}`));
    if (delta && delta[1]) more.push(el("span", { class: "tilde" }, `~${delta[1]}`));
    if (delta && delta[2]) more.push(el("span", { class: "minus" }, `\u2212${delta[2]}`));
    more.push(el("span", {}, `${stage.nodes} nodes`), el("span", {}, stage.phase.toLowerCase()));
    if (stage.least_db !== null) more.push(el("span", { class: stage.broken ? "minus" : "" }, dbText(decibels(stage.least_db))));
    if (stage.error) more.push(el("span", { class: "minus" }, "failed"));
    const bar = stage.seconds === null ? null : el("div", { class: "bar", style: `width:${Math.max(1, (100 * stage.seconds) / slowest)}%`, title: "time of the pass" });
    return el("div", { class: "pass" + (stage.changed ? "" : " same") + (stage.error ? " failed" : ""), title: stage.pass || "the model as given", onclick: () => setStage(n) },
      el("span", { class: "no" }, String(n)), el("span", { class: "name" }, stageLabel(n)), el("span", { class: "ms" }, stage.seconds === null ? "" : `${(stage.seconds * 1e3).toFixed(stage.seconds < 0.1 ? 1 : 0)} ms`), el("span", { class: "more" }, more), bar);
  }));
}

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  readTheme();
  legend();
  showPanel();
  redraw();
}

document.getElementById("title").textContent = core.title;
document.getElementById("about").textContent = `target ${core.target}   ${core.versions}`;
document.getElementById("about").title = core.pipeline;
document.getElementById("tabs").replaceChildren(...Object.entries(TABS).map(([name, [text]]) => el("button", { role: "tab", "data-tab": name, onclick: () => setTab(name) }, text)));
document.getElementById("modes").replaceChildren(...MODES.map(mode => el("button", { role: "radio", "data-mode": mode, onclick: () => setMode(mode) }, mode)));
document.getElementById("keys").replaceChildren(el("table", {}, KEYS.map(([keys, text]) => el("tr", {}, el("td", {}, keys.split("  ").map(k => el("kbd", {}, k))), el("td", {}, text)))));
document.getElementById("help").addEventListener("click", () => ACTIONS["?"]());
document.getElementById("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
new ResizeObserver(redraw).observe(document.getElementById("stage"));

const dark = matchMedia("(prefers-color-scheme: dark)");
document.documentElement.dataset.theme = dark.matches ? "dark" : "light";
dark.addEventListener("change", () => setTheme(dark.matches ? "dark" : "light"));
readTheme();
timeline();
const failure = stages.findIndex(s => s.error), lastChange = stages.map(s => s.changed).lastIndexOf(true);
setMode("precision");
setStage(failure >= 0 ? failure : Math.max(0, lastChange));
home();
canvas.focus({ preventScroll: true });
draw();
document.documentElement.dataset.firstPaint = performance.now().toFixed(1);

// What tests and scripts may ask of the page.
window.qcompilerViewer = {
  select: name => select(name, true), setStage, setMode, setBefore, setTab, fit, home, draw,
  search: text => { searchBox.value = text; runSearch(true); return found.map(i => graphShown().nodes[i][NAME]); },
  position: name => { const g = graphShown(), i = g.byName.get(name), [x, y, w] = frame(g.frames, i), r = canvas.getBoundingClientRect(); return [r.left + (x + w / 2) * view.k + view.x, r.top + (y + 12) * view.k + view.y]; },
  colour: name => colourList()[graphShown().byName.get(name)],
  state: () => ({ ...shown, tab, matchNames: [...shown.matchNames], matches: found.length, drawn: { ...drawn }, view: { ...view }, nodes: graphShown() ? graphShown().nodes.length : 0 }),
};
