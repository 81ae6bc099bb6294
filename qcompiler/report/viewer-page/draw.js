// ---- drawing: only what the viewport shows, in as much detail as the zoom allows ----
const canvas = document.getElementById("graph"), ink = canvas.getContext("2d");
const mapCanvas = document.getElementById("map"), mapInk = mapCanvas.getContext("2d");
const view = { x: 0, y: 0, k: 1 };
const shown = { stage: 0, selected: null, hover: null, mode: "precision", matchNames: new Set(), before: false };
const theme = {};
const PRECISION_COLOURS = {
  float: "#8793a5", half: "#4f9fd6", int16: "#a583d6", fp8: "#d99a1c", int8: "#25a37a", fp4: "#d9622b", int4: "#cf5a9e", other: "#b9c0ca",
};
const PRECISION_TEXT = {
  float: "float32", half: "float16, bfloat16", int16: "int16", fp8: "fp8", int8: "int8", fp4: "fp4", int4: "int4 and fewer", other: "no float (shapes, masks)",
};
const RAMP = [[10, [205, 50, 60]], [20, [224, 120, 50]], [30, [214, 175, 60]], [40, [100, 175, 100]], [55, [70, 140, 200]]];

function readTheme() {
  const style = getComputedStyle(document.documentElement);
  for (const name of ["paper", "sheet", "line", "ink", "dim", "faint", "accent", "added", "removed", "changed", "edge", "box"]) {
    theme[name] = style.getPropertyValue("--" + name).trim();
  }
}

const graphShown = () => (shown.before ? graphOf(shown.stage - 1) : graphOf(shown.stage));
const stageOfGraph = () => (shown.before ? shown.stage - 1 : shown.stage);

function errorColour(db) {
  if (db === null) return null;
  if (db <= RAMP[0][0]) return `rgb(${RAMP[0][1]})`;
  for (let i = 1; i < RAMP.length; i++) {
    const [low, a] = RAMP[i - 1], [high, b] = RAMP[i];
    if (db <= high) {
      const t = (db - low) / (high - low);
      return `rgb(${a.map((v, c) => Math.round(v + (b[c] - v) * t))})`;
    }
  }
  return `rgb(${RAMP[RAMP.length - 1][1]})`;
}

const passColour = number => `hsl(${(number * 137.5 + 20) % 360} 52% 52%)`;

let colours = { key: "", list: [] };
function colourList() {
  const key = `${stageOfGraph()}|${shown.mode}`;
  if (colours.key === key) return colours.list;
  const graph = graphShown(), number = stageOfGraph();
  const touched = shown.mode === "pass" ? touchedBy(number) : null;
  const list = graph.nodes.map((node, i) => {
    if (shown.mode === "error") { const e = errorOf(number, graph, i); return e ? errorColour(e.db) : null; }
    if (shown.mode === "pass") return touched.has(node[NAME]) ? passColour(touched.get(node[NAME])) : null;
    return shown.mode === "precision" ? PRECISION_COLOURS[core.precisions[node[PRECISION]]] : null;
  });
  colours = { key, list };
  return list;
}

function markOf(name) {
  const made = difference(shown.stage);
  if (shown.before) return made.removed.has(name) ? theme.removed : made.changed.has(name) ? theme.changed : null;
  return made.added.has(name) ? theme.added : made.changed.has(name) ? theme.changed : null;
}

let pending = false;
function redraw() {
  if (pending) return;
  pending = true;
  requestAnimationFrame(() => { pending = false; draw(); });
}

const drawn = { nodes: 0, edges: 0 };
function draw() {
  const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  ink.setTransform(ratio, 0, 0, ratio, 0, 0);
  ink.fillStyle = theme.paper;
  ink.fillRect(0, 0, width, height);
  drawn.nodes = drawn.edges = 0;
  const graph = graphShown();
  if (!graph) { drawMap(); return; }
  ink.setTransform(ratio * view.k, 0, 0, ratio * view.k, ratio * view.x, ratio * view.y);
  const box = { left: -view.x / view.k, top: -view.y / view.k, right: (width - view.x) / view.k, bottom: (height - view.y) / view.k };
  const first = Math.max(0, Math.floor(box.top / BAND)), last = Math.min(graph.bands.length - 1, Math.floor(box.bottom / BAND));
  const nodes = new Set(), edges = new Set();
  for (let b = first; b <= last; b++) {
    for (const i of graph.bands[b].nodes) nodes.add(i);
    for (const i of graph.bands[b].edges) edges.add(i);
  }
  drawEdges(graph, edges, box);
  drawNodes(graph, [...nodes].sort((a, b) => a - b), box);
  drawMap();
}

function drawEdges(graph, indices, box) {
  const chosen = shown.selected === null ? undefined : graph.byName.get(shown.selected);
  const strong = [];
  ink.lineWidth = Math.max(1, 0.6 / view.k);
  ink.strokeStyle = theme.edge;
  ink.beginPath();
  for (const i of indices) {
    const edge = graph.edges[i];
    if (edge[0] === chosen || edge[1] === chosen) { strong.push(edge); continue; }
    if (edge[2]) continue;
    if (tracePath(graph, edge, box)) drawn.edges++;
  }
  ink.stroke();
  if (view.k > 0.3) for (const i of indices) if (graph.edges[i][2]) stub(graph, graph.edges[i]);
  ink.strokeStyle = theme.accent;
  ink.lineWidth = Math.max(1.6, 1.2 / view.k);
  ink.beginPath();
  for (const edge of strong) tracePath(graph, edge, null);
  ink.stroke();
}

function tracePath(graph, edge, box) {
  const [x0, y0] = start(graph, edge), [x1, y1] = end(graph, edge);
  if (box) {
    let low = Math.min(x0, x1), high = Math.max(x0, x1);
    for (let p = 3; p < edge.length; p += 2) { low = Math.min(low, edge[p]); high = Math.max(high, edge[p]); }
    if (high < box.left || low > box.right) return false;
  }
  ink.moveTo(x0, y0);
  let x = x0, y = y0;
  const curved = view.k > 0.2;
  const step = (nx, ny) => {
    if (!curved || Math.abs(nx - x) < 1) { ink.lineTo(nx, ny); } else {
      // A long segment bends at its ends, not over its whole length.
      const bend = Math.min(Math.abs(ny - y) / 2, 40);
      ink.bezierCurveTo(x, y + bend, nx, ny - bend, nx, ny);
    }
    x = nx; y = ny;
  };
  for (let p = 3; p < edge.length; p += 2) step(edge[p], edge[p + 1]);
  step(x1, y1);
  return true;
}

// An edge without a route shows as two short dashes until one of its ends is selected.
function stub(graph, edge) {
  const [x0, y0] = start(graph, edge), [x1, y1] = end(graph, edge);
  ink.save();
  ink.setLineDash([2, 2]);
  ink.beginPath();
  ink.moveTo(x0, y0); ink.lineTo(x0 + 5, y0 + 11);
  ink.moveTo(x1, y1); ink.lineTo(x1 - 5, y1 - 11);
  ink.stroke();
  ink.restore();
}

function drawNodes(graph, indices, box) {
  const list = colourList(), text = view.k >= 0.42, detail = view.k >= 0.13;
  for (const i of indices) {
    const [x, y, w, h] = frame(graph.frames, i);
    if (x > box.right || x + w < box.left || y > box.bottom || y + h < box.top) continue;
    drawn.nodes++;
    const node = graph.nodes[i], colour = list[i] || theme.faint, plain = list[i] === null || list[i] === undefined;
    const terminal = node[OP] === "input" || node[OP] === "output";
    if (graph.holders.has(i)) {
      // A node around its body: a frame, so that what is inside stays legible.
      rounded(x, y, w, h, 6);
      ink.fillStyle = theme.faint;
      ink.globalAlpha = 0.08;
      ink.fill();
      ink.globalAlpha = 1;
      ink.lineWidth = Math.max(1, 0.8 / view.k);
      ink.strokeStyle = theme.faint;
      ink.stroke();
    } else if (!detail) {
      ink.fillStyle = colour;
      ink.globalAlpha = plain ? 0.5 : 0.9;
      ink.fillRect(x, y, w, h);
      ink.globalAlpha = 1;
    } else {
      ink.fillStyle = theme.box;
      rounded(x, y, w, h, terminal ? h / 2 : 4);
      ink.fill();
      ink.fillStyle = colour;
      ink.globalAlpha = plain ? 0.06 : shown.mode === "error" ? 0.5 : node[CONVERSION] ? 0.13 : 0.3;
      ink.fill();
      ink.globalAlpha = 1;
      ink.lineWidth = node[CONVERSION] ? 0.8 : 1.1;
      ink.strokeStyle = colour;
      ink.stroke();
      if (!terminal && !node[CONVERSION] && !plain) { ink.fillStyle = colour; ink.fillRect(x, y + 4, 3.5, h - 8); }
    }
    outline(node[NAME], x, y, w, h);
    if (text) label(node, x, y, w, h, terminal);
  }
}

function outline(name, x, y, w, h) {
  const ring = (colour, gap, width) => {
    ink.strokeStyle = colour;
    ink.lineWidth = Math.max(width, width * 0.6 / view.k);
    rounded(x - gap, y - gap, w + 2 * gap, h + 2 * gap, 6);
    ink.stroke();
  };
  const mark = markOf(name);
  if (mark) ring(mark, 2, 1.8);
  if (shown.matchNames.has(name)) ring(theme.accent, 4, 1.6);
  if (shown.selected === name) { ring(theme.accent, 4, 3); }
  else if (shown.hover === name) ring(theme.dim, 3, 1);
}

function label(node, x, y, w, h, terminal) {
  ink.textAlign = "center";
  ink.textBaseline = "middle";
  const middle = x + w / 2;
  if (terminal) {
    ink.fillStyle = theme.ink;
    ink.font = "11px system-ui, sans-serif";
    ink.fillText(tail(node[NAME], 26), middle, y + h / 2, w - 10);
    return;
  }
  ink.fillStyle = theme.ink;
  ink.font = `${node[CONVERSION] ? "" : "600 "}11.5px system-ui, sans-serif`;
  ink.fillText(tail(node[OP].split("::").pop(), 28), middle, y + 12, w - 12);
  ink.fillStyle = theme.dim;
  ink.font = "9.5px system-ui, sans-serif";
  ink.fillText(tail(node[NAME], 24), middle, y + 25, w - 10);
}

const tail = (text, most) => (text.length > most ? "\u2026" + text.slice(text.length - most + 1) : text);

function rounded(x, y, w, h, r) { ink.beginPath(); ink.roundRect(x, y, w, h, Math.min(r, h / 2, w / 2)); }

// ---- overview ----
const overview = { key: "", image: null, scale: 1 };
function drawMap() {
  const graph = graphShown(), most = document.getElementById("stage").clientHeight - 60, wide = 64;
  mapCanvas.style.display = graph ? "block" : "none";
  if (!graph) return;
  const key = `${colourList() && colours.key}|${most}|${theme.paper}|${shown.stage}`;
  const sx = wide / Math.max(graph.width, 1), sy = Math.min(sx * 4, most / Math.max(graph.height, 1));
  const tall = Math.max(10, Math.round(graph.height * sy)), ratio = window.devicePixelRatio || 1;
  if (overview.key !== key) {
    overview.key = key;
    overview.image = new OffscreenCanvas(wide * ratio, tall * ratio);
    const c = overview.image.getContext("2d");
    c.scale(ratio, ratio);
    graph.nodes.forEach((node, i) => {
      if (graph.holders.has(i)) return;
      const [x, y, w, h] = frame(graph.frames, i), mark = shown.mode === "error" ? null : markOf(node[NAME]);
      c.fillStyle = mark || colours.list[i] || theme.faint;
      c.globalAlpha = mark || colours.list[i] ? 0.9 : 0.35;
      c.fillRect(x * sx, y * sy, Math.max(w * sx, 1), Math.max(h * sy, 0.7));
    });
  }
  mapCanvas.width = wide * ratio;
  mapCanvas.height = tall * ratio;
  mapCanvas.style.width = wide + 2 + "px";
  mapCanvas.style.height = tall + 2 + "px";
  mapInk.drawImage(overview.image, 0, 0);
  mapInk.setTransform(ratio, 0, 0, ratio, 0, 0);
  overview.sx = sx; overview.sy = sy;
  mapInk.strokeStyle = theme.accent;
  mapInk.lineWidth = 1.5;
  const x = (-view.x / view.k) * sx, y = (-view.y / view.k) * sy;
  const w = (canvas.clientWidth / view.k) * sx, h = (canvas.clientHeight / view.k) * sy;
  mapInk.strokeRect(Math.max(0.7, x), Math.max(0.7, y), Math.min(wide - 1.4, w), Math.max(4, Math.min(tall - 1.4, h)));
}

// ---- places ----
function fit() {
  const graph = graphShown();
  if (!graph) return;
  const k = Math.min(canvas.clientWidth / (graph.width + 80), canvas.clientHeight / (graph.height + 80), 1.2);
  view.k = k;
  view.x = (canvas.clientWidth - graph.width * k) / 2;
  view.y = (canvas.clientHeight - graph.height * k) / 2;
  redraw();
}

// A deep graph starts at its top in a readable size rather than as a thin thread.
function home() {
  const graph = graphShown();
  if (!graph) return;
  const whole = Math.min(canvas.clientWidth / (graph.width + 80), canvas.clientHeight / (graph.height + 80));
  view.k = Math.min(1, Math.max(whole, 0.55));
  const firsts = graph.nodes.map((_, i) => i).filter(i => graph.frames[4 * i + 1] < 40 && graph.parents[i] < 0);
  const middle = firsts.reduce((sum, i) => sum + graph.frames[4 * i] + graph.frames[4 * i + 2] / 2, 0) / Math.max(1, firsts.length);
  view.x = canvas.clientWidth / 2 - middle * view.k;
  view.y = 40;
  redraw();
}

function centre(i, zoom) {
  const graph = graphShown(), [x, y, w, h] = frame(graph.frames, i);
  view.k = zoom || Math.max(view.k, 0.7);
  view.x = canvas.clientWidth / 2 - (x + w / 2) * view.k;
  view.y = canvas.clientHeight / 2 - (y + Math.min(h, 200) / 2) * view.k;
  redraw();
}

function visible(i) {
  const graph = graphShown(), [x, y, w, h] = frame(graph.frames, i);
  const left = x * view.k + view.x, top = y * view.k + view.y;
  return left > 0 && top > 0 && left + w * view.k < canvas.clientWidth - 80 && top + h * view.k < canvas.clientHeight;
}

function zoom(factor, cx, cy) {
  const k = Math.min(4, Math.max(0.01, view.k * factor)), f = k / view.k;
  view.x = cx - (cx - view.x) * f;
  view.y = cy - (cy - view.y) * f;
  view.k = k;
  redraw();
}

function nodeAt(px, py) {
  const graph = graphShown();
  if (!graph) return null;
  const x = (px - view.x) / view.k, y = (py - view.y) / view.k;
  const band = graph.bands[Math.floor(y / BAND)];
  let found = null;
  // A body's nodes stand behind the node that holds them, so the last hit is the innermost.
  for (const i of band ? band.nodes : []) {
    const [l, t, w, h] = frame(graph.frames, i);
    if (x >= l && x <= l + w && y >= t && y <= t + h && (found === null || i > found)) found = i;
  }
  return found;
}
