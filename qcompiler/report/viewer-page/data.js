// ---- what the page was given: stages, node versions, graphs (each parsed when it is first shown) ----
const core = JSON.parse(document.getElementById("data-core").textContent);
const stages = core.stages;
const graphs = new Map();
const [NAME, OP, TEXT, INPUTS, OUTPUTS, TYPES, ORIGINS, PRECISION, CONVERSION, NUMBERS] = core.columns.map((_, i) => i);
const BAND = 400;

function graphOf(number) {
  const id = number < 0 ? null : stages[number].graph;
  if (id === null) return null;
  if (!graphs.has(id)) graphs.set(id, readGraph(JSON.parse(document.getElementById("data-graph-" + id).textContent)));
  return graphs.get(id);
}

function readGraph(raw) {
  const nodes = raw.v.map(index => core.nodes[index]);
  const byName = new Map(), byOrigin = new Map(), maker = new Map(), bands = [];
  let width = 0, height = 0;
  const band = y => Math.max(0, Math.floor(y / BAND));
  const at = index => bands[index] || (bands[index] = { nodes: [], edges: [] });
  nodes.forEach((node, i) => {
    if (!byName.has(node[NAME])) byName.set(node[NAME], i);
    for (const origin of node[ORIGINS]) byOrigin.has(origin) ? byOrigin.get(origin).push(i) : byOrigin.set(origin, [i]);
    for (const value of node[OUTPUTS]) if (!maker.has(value)) maker.set(value, i);
    const [x, y, w, h] = frame(raw.f, i);
    width = Math.max(width, x + w);
    height = Math.max(height, y + h);
    for (let b = band(y); b <= band(y + h); b++) at(b).nodes.push(i);
  });
  const graph = { versions: raw.v, nodes, parents: raw.p, frames: raw.f, edges: raw.e, byName, byOrigin, maker, bands, width, height };
  raw.e.forEach((edge, i) => {
    const [, top] = start(graph, edge), [, bottom] = end(graph, edge);
    for (let b = band(Math.min(top, bottom)); b <= band(Math.max(top, bottom)); b++) at(b).edges.push(i);
  });
  graph.holders = new Set(raw.p);
  graph.readers = nodes.map(() => []);
  graph.sources = nodes.map(() => []);
  for (const edge of raw.e) {
    graph.readers[edge[0]].push(edge[1]);
    graph.sources[edge[1]].push(edge[0]);
  }
  for (let b = 0; b < bands.length; b++) at(b);
  return graph;
}

// An edge is [from, to, 1 if it has no route, x, y, x, y ...].
const frame = (frames, i) => [frames[4 * i], frames[4 * i + 1], frames[4 * i + 2], frames[4 * i + 3]];
const start = (graph, edge) => { const [x, y, w, h] = frame(graph.frames, edge[0]); return [x + w / 2, y + h]; };
const end = (graph, edge) => { const [x, y, w] = frame(graph.frames, edge[1]); return [x + w / 2, y]; };

// ---- what changed between two stages ----
const differences = new Map();
function difference(number) {
  if (!differences.has(number)) differences.set(number, compare(number));
  return differences.get(number);
}

function compare(number) {
  const now = graphOf(number), before = stages[number].pass === null ? null : graphOf(number - 1);
  const made = { added: new Set(), changed: new Set(), removed: new Set() };
  if (!now || !before || now === before) return made;
  for (const [name, i] of now.byName) {
    const j = before.byName.get(name);
    if (j === undefined) made.added.add(name);
    else if (now.nodes[i][TEXT] !== before.nodes[j][TEXT]) made.changed.add(name);
  }
  for (const name of before.byName.keys()) if (!now.byName.has(name)) made.removed.add(name);
  return made;
}

// The latest pass up to a stage that made or changed each node.
const touches = new Map();
function touchedBy(number) {
  if (!touches.has(number)) {
    const found = new Map(number > 0 ? touchedBy(number - 1) : []);
    const made = difference(number);
    for (const name of [...made.added, ...made.changed]) found.set(name, number);
    if (stages[number].pass === null) found.clear();
    touches.set(number, found);
  }
  return touches.get(number);
}

// ---- scales, errors, remarks ----
function latest(table, number) {
  for (let n = number; n >= 0; n--) if (table[n]) return table[n];
  return null;
}
const planAt = number => latest(core.plans, number);

// The name that the plan and the statistics know a value by: what Q/DQ carry is the value in front of them.
function baseValue(graph, value) {
  const plain = value.replace(/:(q|dq|dyn_q)$/, "");
  if (core.statistics[plain]) return plain;
  let name = value;
  for (let step = 0; step < 8; step++) {
    if (core.statistics[name]) return name;
    const i = graph.maker.get(name);
    if (i === undefined || !graph.nodes[i][CONVERSION] || !graph.nodes[i][INPUTS][0]) break;
    name = graph.nodes[i][INPUTS][0];
  }
  return name;
}

function pointFor(plan, graph, value) {
  if (!plan) return null;
  const base = baseValue(graph, value);
  const key = [value, base, value.replace(/:(q|dq|dyn_q)$/, ""), base + "@dynamic"].find(k => plan.points[k]);
  return key === undefined ? null : [key, plan.points[key]];
}

const decibels = db => (db === null || db === undefined ? null : typeof db === "string" ? Number(db.replace("inf", "Infinity").replace("nan", "NaN")) : db);

// Least SQNR measured at a node up to a stage, else what the plan's histogram lets expect.
const errorTables = new Map();
function errorsAt(number) {
  if (!errorTables.has(number)) {
    const found = new Map(number > 0 && stages[number].pass !== null ? errorsAt(number - 1) : []);
    for (const [value, figure] of Object.entries(core.figures[number] || {})) {
      const db = decibels(figure.sqnr_db);
      if (!Number.isNaN(db)) found.set(value, Math.min(db, found.has(value) ? found.get(value) : Infinity));
    }
    errorTables.set(number, found);
  }
  return errorTables.get(number);
}

function errorOf(number, graph, i) {
  const measured = errorsAt(number), plan = planAt(number);
  let least = null, kind = "measured";
  for (const value of graph.nodes[i][OUTPUTS]) if (measured.has(value) && (least === null || measured.get(value) < least)) least = measured.get(value);
  if (least === null && plan) {
    for (const value of graph.nodes[i][OUTPUTS]) {
      const point = pointFor(plan, graph, value);
      const db = point && point[1].expected_db;
      if (typeof db === "number" && (least === null || db < least)) { least = db; kind = "expected"; }
    }
  }
  return least === null ? null : { db: least, kind };
}

// ---- search ----
function search(graph, text) {
  const wanted = text.trim().toLowerCase();
  if (!wanted || !graph) return [];
  const match = /^(op|value|name|origin):(.*)$/.exec(wanted);
  const [field, needle] = match ? [match[1], match[2].trim()] : ["any", wanted];
  if (!needle) return [];
  const has = s => s.toLowerCase().includes(needle);
  const tests = {
    op: n => has(n[OP]), name: n => has(n[NAME]), origin: n => n[ORIGINS].some(has),
    value: n => n[OUTPUTS].some(has) || n[INPUTS].some(has),
  };
  const any = n => tests.name(n) || tests.op(n) || tests.value(n) || tests.origin(n);
  const test = field === "any" ? any : tests[field];
  const found = [];
  graph.nodes.forEach((node, i) => { if (test(node)) found.push(i); });
  const rank = i => { const n = graph.nodes[i][NAME].toLowerCase(); return n === needle ? 0 : n.includes(needle) ? 1 : has(graph.nodes[i][OP]) ? 2 : 3; };
  return field === "any" ? found.map(i => [rank(i), i]).sort((a, b) => a[0] - b[0] || a[1] - b[1]).map(p => p[1]) : found;
}
