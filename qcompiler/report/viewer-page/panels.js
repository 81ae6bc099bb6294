// ---- the right side: a node and its history, what a pass changed, the pass itself ----
const el = (tag, attributes, ...children) => {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(key, value);
  }
  for (const child of children.flat()) if (child !== null && child !== undefined) made.append(child);
  return made;
};
const panel = document.getElementById("panel");
const number = x => (typeof x !== "number" ? String(x) : Math.abs(x) >= 1e5 || (x !== 0 && Math.abs(x) < 1e-3) ? x.toExponential(3) : String(Number(x.toPrecision(5))));
const dbText = db => (db === null ? "" : db === Infinity ? "equal" : Number.isNaN(db) ? "nan" : db.toFixed(1) + " dB");
const stageLabel = n => stages[n].pass === null ? "import" : stages[n].title;
const row = (name, ...what) => el("div", { class: "row" }, el("span", {}, name), el("span", {}, ...what));
const goNode = (name, stage, text) => el("a", { class: "go", onclick: () => { if (stage !== undefined && stage !== shown.stage) setStage(stage); select(name, true); } }, text || name);
const goStage = n => el("a", { class: "go", onclick: () => setStage(n) }, `${n} ${stageLabel(n)}`);

function nodePanel() {
  const graph = graphShown(), i = graph && shown.selected !== null ? graph.byName.get(shown.selected) : undefined;
  if (shown.selected === null) return [el("p", { class: "empty" }, "Click a node to see where it comes from, what touched it, and its numbers.")];
  if (i === undefined) return [el("h2", {}, shown.selected), el("p", { class: "empty" }, "This stage does not have the node."), ...history(shown.selected, null)];
  const node = graph.nodes[i], plan = planAt(stageOfGraph());
  const chips = [node[OP], PRECISION_TEXT[core.precisions[node[PRECISION]]]];
  return [
    el("h2", {}, node[NAME]),
    el("div", {}, chips.map(c => el("span", { class: "chip" }, c))),
    el("div", { class: "mono" }, node[TEXT]),
    ...valuesSection(graph, node, i),
    ...planSection(graph, node, plan),
    ...errorSection(graph, node),
    ...history(node[NAME], node),
  ];
}

function valuesSection(graph, node, i) {
  const rows = [];
  node[INPUTS].forEach((value, index) => {
    const numbers = (node[NUMBERS] || {})[index];
    if (!value) { if (numbers) rows.push(row(`input ${index}`, `constant: ${numbers}`)); return; }
    const maker = graph.maker.get(value);
    rows.push(row(`input ${index}`, maker === undefined ? value : goNode(graph.nodes[maker][NAME], undefined, value), typeOf(graph, value)));
  });
  node[OUTPUTS].forEach((value, index) => {
    rows.push(row(`output ${index}`, value, el("span", { class: "empty" }, "  " + (node[TYPES][index] || ""))));
  });
  const readers = [...new Set(graph.readers[i])];
  if (readers.length) rows.push(row("read by", ...listed(readers.map(r => goNode(graph.nodes[r][NAME])), 8)));
  return [el("h3", {}, "Values"), ...rows];
}

function typeOf(graph, value) {
  const maker = graph.maker.get(value);
  if (maker === undefined) return "";
  const type = graph.nodes[maker][TYPES][graph.nodes[maker][OUTPUTS].indexOf(value)];
  return el("span", { class: "empty" }, "  " + (type || ""));
}

function listed(links, most) {
  const made = links.slice(0, most).flatMap((link, i) => (i ? [", ", link] : [link]));
  if (links.length > most) made.push(`, and ${links.length - most} more`);
  return made;
}

function planSection(graph, node, plan) {
  const made = [], seen = new Set();
  const group = plan && [node[NAME], ...node[ORIGINS]].map(n => [n, plan.choices[n]]).find(p => p[1]);
  if (group) made.push(row("form", `${group[1][0]}${group[1][1] ? ": " + group[1][1] : ""}` + (group[0] === node[NAME] ? "" : ` (group ${group[0]})`)));
  const add = (key, point, what) => { if (!seen.has(key)) { seen.add(key).add(key.replace(/@dynamic$/, "")); made.push(pointCard(key, point, what)); } };
  if (plan) {
    const owners = new Set([node[NAME], ...node[ORIGINS]]);
    for (const owner of owners) for (let n = 0; n < 16; n++) if (plan.points[`${owner}#${n}`]) add(`${owner}#${n}`, plan.points[`${owner}#${n}`], `constant input ${n}`);
  }
  for (const [values, what] of [[node[OUTPUTS], "output"], [node[INPUTS], "input"]]) {
    for (const value of values) {
      if (!value) continue;
      const found = pointFor(plan, graph, value);
      if (found) add(found[0], found[1], what);
      const base = baseValue(graph, value);
      if (core.statistics[base] && !seen.has(base)) { seen.add(base); made.push(pointCard(base, null, what)); }
    }
  }
  return made.length ? [el("h3", {}, "Quantization and observed values"), ...made] : [];
}

function pointCard(key, point, what) {
  const base = (point && point.root ? point.root : key).replace(/@dynamic$/, ""), seen = core.statistics[base], rows = [];
  if (point) {
    const how = [point.format, point.axis !== undefined ? `axis ${point.axis}` : "per tensor", point.block ? `blocks of ${point.block}` : "", point.symmetric ? "symmetric" : "", point.dynamic ? "dynamic" : "", point.scale_format ? `scales ${point.scale_format}` : ""].filter(Boolean).join(", ");
    rows.push(row("stored as", how));
    if (point.scale !== undefined) {
      const many = Array.isArray(point.scale);
      rows.push(row("scale", many ? `${point.scales} scales, ${number(point.scale[0])} to ${number(point.scale[1])}` : number(point.scale)));
      rows.push(row("zero point", many ? `${point.zero_point[0]} to ${point.zero_point[1]}` : String(point.zero_point)));
    }
    rows.push(row("because", provenance(point)));
    if (typeof point.expected_db === "number") rows.push(row("expected", `${dbText(point.expected_db)} SQNR from the histogram`));
    if (point.note) rows.push(row("note", point.note));
  }
  const card = el("div", { class: "point" }, el("b", {}, key), ` (${what})`, ...rows);
  if (seen) {
    card.append(row("observed", `${number(seen.minimum)} to ${number(seen.maximum)}, mean ${number(seen.mean)}, std ${number(seen.std)}`));
    card.append(row("", `${seen.count} elements, ${seen.executions} feeds, ${((100 * seen.zeros) / seen.count).toFixed(1)}% zero` + (seen.nans ? `, ${seen.nans} nan` : "") + (seen.infinities ? `, ${seen.infinities} inf` : "")));
    const plot = el("canvas", { class: "histogram", title: "observed values, logarithmic counts; the lines are the range in use" });
    card.append(plot);
    requestAnimationFrame(() => histogram(plot, seen, point && point.range));
  }
  return card;
}

function provenance(point) {
  const from = point.points || [];
  if (point.kind === "observed") return point.range ? `observed, estimator ${point.estimator}: ${number(point.range[0])} to ${number(point.range[1])}` : point.dynamic ? "scale and zero point are found when it runs" : "observed";
  if (point.kind === "shared") return `shared with ${from.join(", ")}` + (point.range ? `: observed, estimator ${point.estimator}: ${number(point.range[0])} to ${number(point.range[1])}` : "");
  if (point.kind === "derived") return `derived: scale of ${from.join(" \u00d7 ")}`;
  if (point.kind === "fixed") return "fixed: by the model, or by what the operator can give";
  return "the constant itself; see the numbers of the node that holds it";
}

function histogram(plot, seen, range) {
  const ratio = window.devicePixelRatio || 1, w = plot.clientWidth, h = plot.clientHeight;
  if (!w) return;
  plot.width = w * ratio;
  plot.height = h * ratio;
  const c = plot.getContext("2d");
  c.scale(ratio, ratio);
  const high = seen.low + seen.step * seen.bins.length, low = Math.min(seen.low, range ? range[0] : seen.low), top = Math.max(high, range ? range[1] : high);
  const at = v => 2 + ((v - low) / (top - low || 1)) * (w - 4), most = Math.log1p(Math.max(...seen.bins));
  seen.bins.forEach((count, i) => {
    const tall = count ? Math.max(1, (Math.log1p(count) / most) * (h - 18)) : 0, x = at(seen.low + i * seen.step);
    c.fillStyle = PRECISION_COLOURS.half;
    c.globalAlpha = 0.75;
    c.fillRect(x, h - 14 - tall, Math.max(1, at(seen.low + (i + 1) * seen.step) - x - 0.5), tall);
  });
  c.globalAlpha = 1;
  c.fillStyle = theme.dim;
  c.font = "10px system-ui, sans-serif";
  c.fillText(number(low), 2, h - 3);
  c.textAlign = "right";
  c.fillText(number(top), w - 2, h - 3);
  c.fillStyle = c.strokeStyle = theme.removed;
  for (const edge of range || []) c.fillRect(Math.min(w - 1.5, Math.max(0, at(edge) - 0.75)), 2, 1.5, h - 16);
}

function errorSection(graph, node) {
  const rows = [];
  for (let n = 0; n < stages.length; n++) {
    for (const value of node[OUTPUTS]) {
      const figure = (core.figures[n] || {})[value];
      if (figure) rows.push(el("tr", {}, el("td", {}, goStage(n)), el("td", {}, value), el("td", { class: "num" }, dbText(decibels(figure.sqnr_db)))));
    }
  }
  return rows.length ? [el("h3", {}, "Error each pass made here (same inputs, before against after)"), el("table", { class: "figures" }, rows)] : [];
}

// ---- history ----
function history(name, node) {
  const origins = new Set(node ? node[ORIGINS] : []), names = new Set([name, ...origins]);
  const made = [el("h3", {}, "History")];
  if (origins.size && stages.length) made.push(row("origin", ...listed([...origins].map(o => goNode(o, 0)), 12)));
  const sameOrigin = node ? siblings(graphShown(), node) : [];
  if (sameOrigin.length) made.push(row("beside it", ...listed(sameOrigin.map(n => goNode(n[NAME])), 6)));
  for (let n = 0; n < stages.length; n++) {
    const event = eventAt(n, name, names, node);
    if (event.length) made.push(el("div", { class: "event" + (n === shown.stage ? " here" : "") }, el("div", { class: "head" }, goStage(n)), ...event));
  }
  return made;
}

function siblings(graph, node) {
  const found = new Set();
  for (const origin of node[ORIGINS]) for (const i of graph.byOrigin.get(origin) || []) if (graph.nodes[i][NAME] !== node[NAME]) found.add(graph.nodes[i]);
  return [...found];
}

function eventAt(n, name, names, node) {
  const now = graphOf(n), before = n > 0 && stages[n].pass !== null ? graphOf(n - 1) : null, made = [];
  if (now && now !== before) {
    const i = now.byName.get(name), j = before ? before.byName.get(name) : undefined;
    if (i !== undefined && j === undefined) {
      made.push(el("div", { class: "what" }, before ? "made here" : "in the model as imported"));
      if (before) made.push(line("add", now.nodes[i][TEXT], null, name, n));
    } else if (i !== undefined && now.nodes[i][TEXT] !== before.nodes[j][TEXT]) {
      made.push(el("div", { class: "what" }, "changed"), ...pair(before.nodes[j], now.nodes[i], n));
    } else if (i === undefined && j !== undefined) {
      const heirs = before.nodes[j][ORIGINS].flatMap(o => now.byOrigin.get(o) || []).map(k => now.nodes[k][NAME]);
      made.push(el("div", { class: "what" }, "removed", ...(heirs.length ? ["; of the same origin: ", ...listed([...new Set(heirs)].map(h => goNode(h, n)), 5)] : [])));
    } else if (i === undefined && before && node) made.push(...ancestors(n, now, before, node));
  }
  for (const rule of core.rules[n] || []) {
    if (names.has(rule.node) || rule.origins.some(o => names.has(o))) made.push(el("div", {}, "rule ", el("b", {}, rule.rule), ` applied at ${rule.node}`));
  }
  for (const remark of core.remarks[n] || []) if (names.has(remark.node)) made.push(remarkLine(remark, false));
  return made;
}

function ancestors(n, now, before, node) {
  const of = graph => new Map(node[ORIGINS].flatMap(o => graph.byOrigin.get(o) || []).map(i => [graph.nodes[i][TEXT], graph.nodes[i][NAME]]));
  const a = of(before), b = of(now), added = [...b].filter(([text]) => !a.has(text)).map(entry => entry[1]);
  return added.length ? [el("div", { class: "what" }, "its origin becomes ", ...listed(added.map(name => goNode(name, n)), 4))] : [];
}

function remarkLine(remark, withNode) {
  const head = el("span", { class: remark.done ? "done" : "left" }, remark.done ? "done " : "left ");
  const figures = Object.entries(remark.numbers || {}).map(([k, v]) => `${k} ${number(v)}`).join(", ");
  const where = withNode && remark.node ? [goNode(remark.node), " "] : [];
  return el("div", { class: "remark" }, head, ...where, el("b", {}, remark.rule || remark.pass_name), ` ${remark.reason}`, remark.text ? `: ${remark.text}` : "", figures ? ` (${figures})` : "");
}

// ---- what a pass changed ----
function line(kind, text, other, name, stage) {
  const made = el("div", { class: `line ${kind}`, onclick: () => { if (stage !== shown.stage) setStage(stage); setBefore(kind === "del"); select(name, true); } });
  made.append(kind === "add" ? "+ " : kind === "del" ? "\u2212 " : "  ");
  if (other === null) { made.append(text); return made; }
  let head = 0, back = 0;
  while (head < text.length && text[head] === other[head]) head++;
  while (back < text.length - head && back < other.length - head && text[text.length - 1 - back] === other[other.length - 1 - back]) back++;
  made.append(text.slice(0, head), el("b", {}, text.slice(head, text.length - back)), text.slice(text.length - back));
  return made;
}
const pair = (old, now, stage) => [line("del", old[TEXT], now[TEXT], old[NAME], stage), line("add", now[TEXT], old[TEXT], now[NAME], stage)];

const MOST_LINES = 400;
function changesPanel() {
  const n = shown.stage, made = difference(n), total = made.added.size + made.changed.size + made.removed.size;
  const head = el("h2", {}, `${n} ${stageLabel(n)}`);
  if (stages[n].pass === null) return [head, el("p", { class: "empty" }, "The graph as it was given to the first pass.")];
  if (!total) return [head, el("p", { class: "empty" }, stages[n].changed ? "Only things outside of nodes changed (constants, types, functions)." : "This pass did not change the graph.")];
  const summary = el("p", {}, el("span", { class: "plus" }, `${made.added.size} added `), el("span", { class: "tilde" }, `${made.changed.size} changed `), el("span", { class: "minus" }, `${made.removed.size} removed`), " ", el("button", { onclick: () => setBefore(!shown.before) }, shown.before ? "show after (b)" : "show before (b)"));
  const hunks = changedNodes(n, made).slice(0, MOST_LINES).map(([old, now]) => el("div", { class: "hunk" }, old && now ? pair(old, now, n) : old ? line("del", old[TEXT], null, old[NAME], n) : line("add", now[TEXT], null, now[NAME], n)));
  if (total > MOST_LINES) hunks.push(el("p", { class: "empty" }, `${total - MOST_LINES} more; qcompiler inspect --diff ${n} lists all`));
  return [head, summary, ...hunks];
}

// Pairs (before, after) in program order, removed nodes where they stood.
function changedNodes(n, made) {
  const now = graphOf(n), before = graphOf(n - 1), found = [];
  let j = 0;
  const removedUntil = name => {
    for (; j < before.nodes.length && before.nodes[j][NAME] !== name; j++) if (made.removed.has(before.nodes[j][NAME])) found.push([before.nodes[j], null]);
  };
  for (const node of now.nodes) {
    const name = node[NAME], old = before.byName.get(name);
    if (old !== undefined && old >= j) removedUntil(name);
    if (made.added.has(name)) found.push([null, node]);
    else if (made.changed.has(name)) found.push([before.nodes[old], node]);
  }
  removedUntil(null);
  return found;
}

// ---- the pass ----
function passPanel() {
  const n = shown.stage, stage = stages[n], made = [el("h2", {}, `${n} ${stage.pass || "the model as given"}`)];
  made.push(row("phase", stage.phase), row("nodes", String(stage.nodes)), row("weights", `${(stage.weights / 1e6).toFixed(2)} MB`));
  if (stage.seconds !== null) made.push(row("time", `${(stage.seconds * 1e3).toFixed(1)} ms`));
  if (stage.pass !== null) made.push(row("changes", String(stage.changes)));
  if (stage.error) made.push(row("failed", el("span", { class: "minus" }, stage.error)));
  if (stage.problem) made.push(row("graph", stage.problem));
  const numerics = stage.numerics;
  if (numerics) {
    made.push(row("contract", numerics.contract), row("compared", `${numerics.compared} values`));
    if (numerics.unchecked) made.push(row("unchecked", numerics.unchecked));
    if (numerics.violations.length) made.push(row("broken at", ...listed(numerics.violations.map(v => el("span", { class: "minus" }, v)), 8)));
    for (const [name, db] of Object.entries(numerics.sqnr_db)) made.push(row("SQNR", `${name}: ${dbText(decibels(db))}`));
  }
  made.push(el("h3", {}, "Operators"), el("p", {}, Object.entries(stage.ops).sort((a, b) => b[1] - a[1]).map(([op, count]) => el("span", { class: "chip" }, `${op} ${count}`))));
  if (core.plans[n]) made.push(...formsSection(core.plans[n]));
  made.push(...countsSection("Rules applied", (core.rules[n] || []).map(r => [r.rule, r.node, null])));
  made.push(...countsSection("Remarks", (core.remarks[n] || []).map(r => [`${r.done ? "done" : "left"} ${r.rule || r.pass_name}: ${r.reason}`, r.node, r])));
  return made;
}

function formsSection(plan) {
  const counts = new Map();
  for (const [form] of Object.values(plan.choices)) counts.set(form, (counts.get(form) || 0) + 1);
  return [el("h3", {}, "Plan"), el("p", {}, [...counts].map(([form, count]) => el("span", { class: "chip" }, `${form} ${count}`)), el("span", { class: "chip" }, `${Object.keys(plan.points).length} points`))];
}

function countsSection(title, entries) {
  if (!entries.length) return [];
  const groups = new Map();
  for (const entry of entries) groups.has(entry[0]) ? groups.get(entry[0]).push(entry) : groups.set(entry[0], [entry]);
  const sorted = [...groups].sort((a, b) => b[1].length - a[1].length);
  return [el("h3", {}, `${title} (${entries.length})`), ...sorted.map(([key, members]) => {
    const body = el("div", {});
    const open = el("details", { ontoggle: () => { if (!body.childNodes.length) for (const m of members.slice(0, 200)) body.append(m[2] ? remarkLine(m[2], true) : el("div", {}, goNode(m[1]))); } });
    open.append(el("summary", {}, `${members.length} \u00d7 ${key}`), body);
    return open;
  })];
}
