// The memory explorer of chapter 12: a plain ES module without dependencies, read by anywidget and by to_html() alike.
// `book` holds the laws that the notebook has fitted; all arithmetic that both sides need is in forecast(), as in the notebook.

const KINDS = ["parameters", "gradients", "optimizer", "activations"];
const LABELS = {
  frames: "Frames", size: "Size", dtype: "Numbers", guidance: "Guidance", training: "Training",
  checkpointing: "Checkpointing", attention: "Attention", trained: "What is trained", optimizer: "Optimizer", model: "Model",
};
const ONLY_TRAINING = ["checkpointing", "trained", "optimizer"];

const STYLE = `
.mx { --mx-ink: var(--jp-ui-font-color1, #1d2129); --mx-soft: var(--jp-ui-font-color2, #5b6270); --mx-line: var(--jp-border-color2, #d5d8de);
  --mx-paper: var(--jp-layout-color0, #ffffff); --mx-raised: var(--jp-layout-color1, #f6f7f9); --mx-accent: #1f4e9c;
  --parameters: #16325f; --gradients: #546a94; --optimizer: #a39b7c; --activations: #ecd682;
  --on-parameters: #fff; --on-gradients: #fff; --on-optimizer: #111; --on-activations: #111;
  color: var(--mx-ink); background: var(--mx-paper); font: 14px/1.45 var(--jp-ui-font-family, system-ui, sans-serif); padding: 12px 14px; box-sizing: border-box; container-type: inline-size; }
.mx.mx-dark { --mx-ink: var(--jp-ui-font-color1, #e7e9ee); --mx-soft: var(--jp-ui-font-color2, #a9b0bd); --mx-line: var(--jp-border-color2, #41464f);
  --mx-paper: var(--jp-layout-color0, #14161a); --mx-raised: var(--jp-layout-color1, #1d2026); --mx-accent: #8db4f5;
  --parameters: #33507f; --gradients: #6c82ab; --optimizer: #b3aa89; --activations: #f0dc92; --on-gradients: #111; }
.mx *, .mx *::before { box-sizing: border-box; }
.mx [hidden] { display: none !important; }
.mx h3, .mx h4 { margin: 0; font-weight: 600; line-height: 1.25; }
.mx h3 { font-size: 17px; } .mx h4 { font-size: 14px; }
.mx p { margin: 0; }
.mx button, .mx select, .mx input { font: inherit; color: inherit; }
.mx button.mx-button { background: var(--mx-raised); border: 1px solid var(--mx-line); border-radius: 6px; padding: 3px 10px; cursor: pointer; }
.mx button.mx-button[aria-pressed=true] { border-color: var(--mx-accent); box-shadow: inset 0 0 0 1px var(--mx-accent); }
.mx button.mx-button:disabled { opacity: .55; cursor: default; }
.mx :focus-visible { outline: 2px solid var(--mx-accent); outline-offset: 2px; }
.mx select { background: var(--mx-raised); border: 1px solid var(--mx-line); border-radius: 6px; padding: 2px 6px; max-width: 100%; }
.mx input[type=range], .mx input[type=checkbox] { accent-color: var(--mx-accent); margin: 0; }
.mx-head { display: flex; flex-wrap: wrap; gap: 8px 14px; align-items: center; margin-bottom: 10px; }
.mx-head h3 { flex: 1 1 auto; }
.mx-sides { display: grid; grid-template-columns: minmax(0, 1fr); gap: 18px; }
.mx-sides.mx-two { grid-template-columns: repeat(2, minmax(0, 1fr)); }
@container (max-width: 760px) { .mx-sides.mx-two { grid-template-columns: minmax(0, 1fr); } }
.mx-side > * + * { margin-top: 10px; }
.mx-controls { border: 1px solid var(--mx-line); border-radius: 8px; margin: 0; padding: 8px 12px 10px; min-width: 0; display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 8px 18px; align-items: end; }
.mx-controls legend { padding: 0 6px; font-weight: 600; }
.mx-controls label { display: flex; flex-direction: column; gap: 2px; color: var(--mx-soft); font-size: 12.5px; }
.mx-controls label.mx-check { flex-direction: row; align-items: center; gap: 7px; color: var(--mx-ink); font-size: 14px; padding-bottom: 3px; }
.mx-controls label > span { display: flex; justify-content: space-between; }
.mx-controls output { color: var(--mx-ink); font-variant-numeric: tabular-nums; }
.mx-controls label.mx-off { opacity: .5; }
.mx-big { display: flex; flex-wrap: wrap; align-items: baseline; gap: 2px 10px; }
.mx-big b { font-size: 24px; font-weight: 600; font-variant-numeric: tabular-nums; }
.mx-big span { color: var(--mx-soft); }
.mx-plot { position: relative; }
.mx-plot svg { display: block; width: 100%; overflow: visible; }
.mx-plot text { fill: var(--mx-soft); font-size: 11.5px; font-family: inherit; }
.mx-plot .mx-card { stroke: var(--mx-ink); stroke-dasharray: 2 4; opacity: .75; }
.mx-plot text.mx-cardname { fill: var(--mx-ink); }
.mx-plot .mx-grid { stroke: var(--mx-line); }
.mx-peak { position: absolute; transform: translate(-50%, -100%); white-space: nowrap; background: var(--mx-paper); border: 1.5px solid var(--mx-ink); border-radius: 6px; padding: 0 7px; cursor: pointer; font-size: 12.5px !important; }
.mx-dot { position: absolute; width: 10px; height: 10px; margin: -5px 0 0 -5px; border-radius: 50%; background: var(--mx-paper); border: 2.5px solid var(--mx-ink); pointer-events: none; }
.mx-cursor { position: absolute; width: 0; border-left: 1.5px solid var(--mx-ink); opacity: .8; pointer-events: none; }
.mx-steps { display: block; width: 100%; }
.mx-read { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 12.5px; min-height: 2.9em; align-content: flex-start; }
.mx-read > span { white-space: nowrap; font-variant-numeric: tabular-nums; }
.mx-read > span.mx-where { flex-basis: 100%; color: var(--mx-soft); overflow: hidden; text-overflow: ellipsis; }
.mx-key { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 5px; vertical-align: -1px; border: 1px solid var(--mx-soft); }
.mx table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; background: none; }
.mx th, .mx td { text-align: right; padding: 2px 8px; border-bottom: 1px solid var(--mx-line); background: none; color: inherit; }
.mx th:first-child, .mx td:first-child { text-align: left; padding-left: 0; }
.mx th { font-weight: 600; color: var(--mx-soft); }
.mx-map { position: relative; height: 300px; }
.mx-map div { position: absolute; overflow: hidden; border: 1px solid var(--mx-paper); font-size: 11px; line-height: 1.2; }
.mx-map div[role=option] { cursor: default; }
.mx-map div[role=option]:focus, .mx-map div[role=option]:hover { outline: 2.5px solid var(--mx-ink); outline-offset: -3px; z-index: 2; }
.mx-told { min-height: 1.5em; font-size: 12.5px; }
.mx details { font-size: 13px; } .mx summary { cursor: pointer; color: var(--mx-soft); }
.mx-scroll { max-height: 260px; overflow: auto; }
.mx-summary { color: var(--mx-soft); font-size: 13px; }
.mx-exercise { border: 1px solid var(--mx-line); border-radius: 8px; padding: 10px 12px; margin-top: 14px; }
.mx-exercise > * + * { margin-top: 6px; }
.mx-verdict { font-weight: 600; }
`;

// ---- arithmetic: what forecast(), frames_that_fit() and judge() do in the notebook ------------------------------------------
export function variantOf(s) {
  const how = s.training ? s.trained + (s.checkpointing ? ", checkpointing" : "") : s.guidance ? "guidance" : "no guidance";
  return `${s.dtype}, ${s.attention}, ${how}`;
}

// Every place of the timeline as {name, peak, parameters, gradients, optimizer, activations, bytes}; `at` is the fullest.
export function forecast(book, s) {
  const part = book.models[s.model], v = part.variants[variantOf(s)];
  const grow = book.powers.map(([i, j]) => s.frames ** i * (s.size / part.cell) ** j);
  const optimizer = s.training ? book.optimizers[s.optimizer] * v.gradients : 0;
  const place = (name, peak, gradients, activations) => {
    const kinds = { parameters: v.parameters, gradients, optimizer, activations };
    return { name, peak, ...kinds, bytes: v.parameters + gradients + optimizer + activations };
  };
  const places = v.places.map(([name, ...rows]) => {
    let best = null, most = -1;
    for (const row of rows) {
      let sum = 0;
      for (let i = 2; i < row.length; i++) sum += row[i] * grow[i - 2];
      if (row[1] + sum > most) { most = row[1] + sum; best = [row[0], row[1], Math.round(sum)]; }
    }
    return place(part.names[name], ...best);
  });
  if (optimizer) places.push(place("optimizer step", -1, v.gradients, v.gradients));
  let at = 0;
  places.forEach((p, i) => { if (p.bytes > places[at].bytes) at = i; });
  return { places, at, top: places[at], names: part.names, alive: v.alive, grow };
}

export const fits = (book, peak, card) => peak + book.reserve <= book.cards[card];

const books = new WeakMap();      // the frames do not matter for it, so a step of their slider finds it here

export function framesThatFit(book, s) {
  if (!books.has(book)) books.set(book, new Map());
  const known = books.get(book), key = [s.model, s.size, s.optimizer, variantOf(s)].join();
  if (!known.has(key)) {
    const [low, high] = book.models[s.model].frames, peaks = [];
    for (let f = low; f <= high; f++) peaks.push(forecast(book, { ...s, frames: f }).top.bytes);
    known.set(key, Object.fromEntries(Object.keys(book.cards).map(card => [card, peaks.reduce((most, p, i) => fits(book, p, card) ? low + i : most, 0)])));
  }
  return known.get(key);
}

// Rows {kind, name, shape, bytes} of what is there at the peak, the largest first.
export function aliveAt({ top, names, alive, grow }) {
  const frames = grow[1], cells = Math.sqrt(grow[2]);
  const rows = KINDS.slice(0, 3).map(kind => ({ kind, name: kind, shape: "", bytes: top[kind] }));
  if (top.peak < 0) rows.push({ kind: "activations", name: top.name, shape: "", bytes: top.activations });
  else for (const [name, dtype, count, sides, factors] of alive[top.peak]) {
    const shape = sides.map(([n, i, j]) => Math.round(n * frames ** i * cells ** j)).join(" × ");
    rows.push({ kind: "activations", name: names[name], shape: shape ? `${count > 1 ? `${count} of ` : ""}${shape} ${dtype}` : `${count} smaller ones`, bytes: Math.round(factors.reduce((sum, c, i) => sum + c * grow[i], 0)) });
  }
  return rows.filter(r => r.bytes > 0).sort((x, y) => y.bytes - x.bytes);
}

export function judge(book, s) {
  const e = book.exercise, peak = forecast(book, s).top.bytes;
  const wrong = Object.keys(e.task).filter(k => s[k] !== e.task[k]), turned = e.switches.filter(k => s[k] !== e.start[k]);
  return { wrong, turned, peak, passed: !wrong.length && fits(book, peak, e.card) };
}

// As human() in the notebook.
export function size(bytes) {
  for (const unit of ["B", "KiB", "MiB"]) {
    if (bytes < 1024) return unit === "B" ? `${bytes} B` : `${bytes.toFixed(1)} ${unit}`;
    bytes /= 1024;
  }
  return `${bytes.toFixed(1)} GiB`;
}

// Squarified treemap (Bruls, Huizing, van Wijk 2000): rows of boxes as square as they go.
export function squarify(items, x, y, w, h) {
  const out = [], total = items.reduce((s, i) => s + i.bytes, 0), area = total ? w * h / total : 0;
  let rest = items.slice();
  while (rest.length && w > 0 && h > 0) {
    const side = Math.min(w, h);
    let row = [], sum = 0, worst = Infinity;
    for (const item of rest) {
      const s = sum + item.bytes * area, all = [...row, item].map(i => i.bytes * area);
      const bad = Math.max(...all.map(a => Math.max(side * side * a / (s * s), s * s / (side * side * a))));
      if (bad > worst) break;
      row.push(item); sum = s; worst = bad;
    }
    const thick = sum / side;
    let along = 0;
    for (const item of row) {
      const length = item.bytes * area / thick;
      out.push(w >= h ? { item, x, y: y + along, w: thick, h: length } : { item, x: x + along, y, w: length, h: thick });
      along += length;
    }
    if (w >= h) { x += thick; w -= thick; } else { y += thick; h -= thick; }
    rest = rest.slice(row.length);
  }
  return out;
}

// ---- words ------------------------------------------------------------------------------------------------------------
const frames = n => `${n} frame${n === 1 ? "" : "s"}`;

const say = (book, value) => value === true ? "on" : value === false ? "off" : book.words[value] || String(value);

export function describe(book, s, { top } = forecast(book, s)) {
  const most = framesThatFit(book, s);
  const what = s.training ? `training ${say(book, s.trained)} with ${say(book, s.optimizer)}${s.checkpointing ? " and checkpointing" : ""}` : s.guidance ? "a call with guidance" : "a call without guidance";
  const parts = KINDS.filter(k => top[k]).map(k => `${k} ${size(top[k])}`), cards = Object.entries(most).map(([card, n]) => `${card}: ${n || "none"}`);
  return `${book.models[s.model].label}, ${frames(s.frames)} of ${s.size} x ${s.size} pixels, ${s.dtype}, ${s.attention} attention, ${what}: ` +
    `${size(top.bytes)} at the peak, in ${top.name} (${parts.join(", ")}). The most frames that fit: ${cards.join(", ")}.`;
}

export function verdict(book, s) {
  const e = book.exercise, v = judge(book, s), n = v.turned.length;
  const turned = `${n} switch${n === 1 ? "" : "es"} turned${n ? ` (${v.turned.map(k => LABELS[k].toLowerCase()).join(", ")})` : ""}`;
  if (v.wrong.length) return `Not the task yet: set ${v.wrong.map(k => `${LABELS[k].toLowerCase()} to ${say(book, e.task[k])}`).join(", ")}.`;
  if (!v.passed) return `Fail: ${size(v.peak + book.reserve - book.cards[e.card])} too much for ${e.card}, ${turned}.`;
  return `Pass: ${size(v.peak)}, ${turned}. ${n > e.fewest ? "It can be done with fewer." : "No fewer will do."}`;
}

// ---- the page ---------------------------------------------------------------------------------------------------------
function make(tag, attrs = {}, ...children) {
  const el = document.createElement(tag);
  for (const [k, v] of Object.entries(attrs)) k in el && k !== "style" && k !== "list" ? el[k] = v : el.setAttribute(k, v);
  el.append(...children);
  return el;
}

const escape = text => String(text).replace(/[&<>"]/g, c => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);

// Dark or light is what the page is painted in, not what the system prefers: a notebook has a theme of its own.
function isDark(el) {
  for (let e = el.parentElement; e; e = e.parentElement) {
    const c = getComputedStyle(e).backgroundColor.match(/[\d.]+/g)?.map(Number);
    if (c && (c.length < 4 || c[3] > 0.5)) return 0.299 * c[0] + 0.587 * c[1] + 0.114 * c[2] < 128;
  }
  return matchMedia("(prefers-color-scheme: dark)").matches;
}

// A control for each axis of the book; `change(key, value)` is called with what the reader chose.
function controls(book, name, change) {
  const box = make("fieldset", { className: "mx-controls" }, make("legend", {}, `Setting ${name}`)), update = [];
  const add = (key, input, read, write, check = false) => {
    const out = make("output"), text = make("span", {}, LABELS[key], out);
    const label = make("label", { className: check ? "mx-check" : "" }, ...(check ? [input, LABELS[key]] : [text, input]));
    input.dataset.key = key;
    input.setAttribute("aria-label", LABELS[key]);
    input.addEventListener("input", () => change(key, read()));
    update.push(s => {
      write(s, out);
      input.disabled = ONLY_TRAINING.includes(key) && !s.training || key === "guidance" && s.training;
      label.classList.toggle("mx-off", input.disabled);
      label.hidden = input.tagName === "SELECT" && input.options.length < 2;
    });
    box.append(label);
  };
  const range = (key, limits, told) => {
    const input = make("input", { type: "range" });
    add(key, input, () => Number(input.value), (s, out) => {
      [input.min, input.max, input.step] = limits(book.models[s.model]);
      input.value = s[key];
      input.setAttribute("aria-valuetext", out.textContent = told(s[key]));
    });
  };
  const check = key => {
    const input = make("input", { type: "checkbox" });
    add(key, input, () => input.checked, s => { input.checked = s[key]; }, true);
  };
  const select = (key, options) => {
    const input = make("select");
    add(key, input, () => input.value, s => {
      const want = options(s);
      if (want.join() !== [...input.options].map(o => o.value).join()) input.replaceChildren(...want.map(o => make("option", { value: o }, book.models[o]?.label || say(book, o))));
      input.value = s[key];
    });
  };
  if (Object.keys(book.models).length > 1) select("model", () => Object.keys(book.models));
  range("frames", m => [...m.frames, 1], n => `${n}`);
  range("size", m => m.sizes, n => `${n} × ${n} px`);
  select("dtype", s => book.models[s.model].dtypes);
  select("attention", s => book.models[s.model].attention);
  select("trained", s => book.models[s.model].trained);
  select("optimizer", () => Object.keys(book.optimizers));
  check("guidance"); check("training"); check("checkpointing");
  return { box, update: s => update.forEach(u => u(s)) };
}

const TOP = 30, BOTTOM = 40, LEFT = 52, RIGHT = 118, HEIGHT = 300;

const short = path => path.replace(/_blocks?\b/g, "").replace(/motion_modules/, "motion").replace(/(resnet|attention|sampler)s\b/g, "$1").replace(/ \(backward\)/, " ⟵").replace(/\./g, " ");

// Neighbouring places that `name` calls the same, as {name, from, to}.
function runs(places, name) {
  const out = [];
  places.forEach((p, i) => { if (out.at(-1)?.name !== name(p)) out.push({ name: name(p), from: i }); out.at(-1).to = i; });
  return out;
}
const pass = place => place.endsWith("(backward)") ? "backward" : place === "optimizer step" ? "step" : "forward";
const blockOf = place => short(place.match(/^\w+(\.\d+)?/)[0].replace(/^(input|loss|conv_\w+|optimizer)$/, ""));

function niceStep(top) {
  const rough = top / 5, power = 2 ** Math.floor(Math.log2(rough));
  return rough / power > 1.5 ? 2 * power : power;
}

function picture(book, now, most, top, width) {
  const n = now.places.length, w = width - LEFT - RIGHT, h = HEIGHT - TOP - BOTTOM;
  const X = i => LEFT + w * i / n, Y = b => TOP + h * (1 - b / top), out = [];
  const step = niceStep(top);
  for (let b = 0; b <= top; b += step) out.push(`<line class="mx-grid" x1="${LEFT}" x2="${LEFT + w}" y1="${Y(b)}" y2="${Y(b)}"/><text x="${LEFT - 6}" y="${Y(b) + 4}" text-anchor="end">${b ? size(b).replace(".0 ", " ") : 0}</text>`);
  let base = now.places.map(() => 0);
  for (const kind of KINDS) {
    if (now.places.every(p => !p[kind])) continue;
    const roof = now.places.map((p, i) => base[i] + p[kind]);
    const over = roof.map((y, i) => `L${X(i).toFixed(1)} ${Y(y).toFixed(1)}L${X(i + 1).toFixed(1)} ${Y(y).toFixed(1)}`).join("");
    const under = base.map((y, i) => `L${X(i + 1).toFixed(1)} ${Y(y).toFixed(1)}L${X(i).toFixed(1)} ${Y(y).toFixed(1)}`).reverse().join("");
    out.push(`<path d="M${(over + under).slice(1)}Z" style="fill:var(--${kind});stroke:var(--mx-paper);stroke-width:.6"/>`);
    const high = Math.min(...now.places.slice(0, 12).map((p, i) => Y(base[i]) - Y(roof[i])));
    if (kind !== "activations" && high > 15) out.push(`<text x="${LEFT + 7}" y="${Y(base[0]) - high / 2 + 4}" style="fill:var(--on-${kind})">${kind}</text>`);
    base = roof;
  }
  out.push(`<path d="M${base.map((y, i) => `L${X(i).toFixed(1)} ${Y(y).toFixed(1)}L${X(i + 1).toFixed(1)} ${Y(y).toFixed(1)}`).join("").slice(1)}" style="fill:none;stroke:var(--mx-ink);stroke-width:.9;stroke-linejoin:round"/>`);
  const label = (r, y) => X(r.to + 1) - X(r.from) > 6.2 * r.name.length && out.push(`<text x="${(X(r.from) + X(r.to + 1)) / 2}" y="${y}" text-anchor="middle">${escape(r.name)}</text>`);
  const names = now.places.map(p => p.name);
  for (const r of runs(names, blockOf)) {
    out.push(`<line class="mx-grid" x1="${X(r.from)}" x2="${X(r.from)}" y1="${TOP + h}" y2="${TOP + h + 6}"/>`);
    label(r, TOP + h + 16);
  }
  for (const r of runs(names, pass)) {
    if (r.from) out.push(`<line x1="${X(r.from)}" x2="${X(r.from)}" y1="${TOP + h}" y2="${HEIGHT - 4}" style="stroke:var(--mx-soft)"/>`);
    label(r, HEIGHT - 8);
  }
  let last = Infinity;
  for (const [card, whole] of Object.entries(book.cards)) {
    const bytes = whole - book.reserve;
    if (bytes > top) continue;
    const y = Y(bytes), text = Math.min(y + 4, last - 13);
    last = text;
    out.push(`<line class="mx-card" x1="${LEFT}" x2="${LEFT + w + 4}" y1="${y}" y2="${y}"/><text class="mx-cardname" x="${LEFT + w + 8}" y="${text}">${card}: ${most[card] ? frames(most[card]) : "no frame"}</text>`);
  }
  return { svg: out.join(""), X, Y };
}

function chart(name, setOpen) {
  const drawn = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  drawn.setAttribute("role", "img");
  const peak = make("button", { className: "mx-peak", type: "button" }), dot = make("div", { className: "mx-dot" }), cursor = make("div", { className: "mx-cursor" });
  const plot = make("div", { className: "mx-plot" }, drawn, cursor, dot, peak);
  const steps = make("input", { type: "range", className: "mx-steps", min: 0, step: 1 });
  steps.setAttribute("aria-label", `Setting ${name}: go through the modules`);
  const read = make("div", { className: "mx-read" });
  let now, view, width, place = null, hover = null;      // what the slider and the pointer are at; null: the peak
  peak.addEventListener("click", () => setOpen());
  steps.addEventListener("input", () => { place = Number(steps.value); hover = null; point(); });
  plot.addEventListener("pointerleave", () => { hover = null; point(); });
  plot.addEventListener("pointermove", e => {
    const i = Math.floor((e.clientX - plot.getBoundingClientRect().left - LEFT) / (width - LEFT - RIGHT) * now.places.length);
    if (i >= 0 && i < now.places.length) { hover = i; point(); }
  });
  function point() {
    const i = Math.min(hover ?? place ?? now.at, now.places.length - 1), x = view.X(i + 0.5);
    steps.value = i;
    cursor.style.cssText = `left:${x}px;top:${TOP}px;height:${HEIGHT - TOP - BOTTOM}px`;
    const p = now.places[i], shown = KINDS.filter(k => now.places.some(q => q[k]));
    read.innerHTML = `<span class="mx-where">${escape(p.name)}${i === now.at ? ": the peak" : ""}</span>` +
      shown.map(k => `<span><i class="mx-key" style="background:var(--${k})"></i>${k} ${size(p[k])}</span>`).join("") + `<span>together <b>${size(p.bytes)}</b></span>`;
    steps.setAttribute("aria-valuetext", `${p.name}: ${size(p.bytes)}`);
  }
  function update(book, s, next, most, top, open) {
    if (now && now.places.length !== next.places.length) place = hover = null;
    now = next;
    width = Math.max(320, plot.clientWidth || 640);
    view = picture(book, now, most, top, width);
    drawn.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    drawn.setAttribute("aria-label", `Memory over the modules in the order in which they run. ${describe(book, s, now)}`);
    drawn.innerHTML = view.svg;
    const x = view.X(now.at + 0.5), y = view.Y(now.top.bytes);
    dot.style.cssText = `left:${x}px;top:${y}px`;
    peak.textContent = `peak ${size(now.top.bytes)} ${open ? "▴" : "▾"}`;
    peak.setAttribute("aria-expanded", open);
    peak.setAttribute("aria-label", `Setting ${name}: peak ${size(now.top.bytes)} in ${now.top.name}. ${open ? "Hide" : "Show"} what is alive there`);
    peak.style.left = `${Math.max(62, Math.min(width - 62, x))}px`;
    peak.style.top = `${y - 8}px`;
    steps.max = now.places.length - 1;
    steps.style.cssText = `margin:0 0 0 ${LEFT}px;width:${width - LEFT - RIGHT}px`;
    point();
  }
  return { nodes: [plot, steps, read], update };
}

// What is alive at the peak: boxes by module, in each its tensors. Arrow keys go through them.
function treemap(name) {
  const map = make("div", { className: "mx-map" }), told = make("p", { className: "mx-told" }), title = make("h4"), body = make("tbody");
  map.setAttribute("role", "listbox");
  told.setAttribute("aria-live", "polite");
  const table = make("table", {}, make("thead"), body);
  table.tHead.innerHTML = "<tr><th>what</th><th>shape</th><th>memory</th></tr>";
  const list = make("details", {}, make("summary", {}, "The same as a table"), make("div", { className: "mx-scroll", tabIndex: 0 }, table));
  const box = make("div", {}, title, map, told, list);
  let boxes = [], current = 0;
  const tell = r => `${r.kind === "activations" ? r.name : r.kind}${r.shape ? `, ${r.shape}` : ""}: ${size(r.bytes)}`;
  function go(i, focus) {
    current = Math.max(0, Math.min(boxes.length - 1, i));
    boxes.forEach((b, k) => { b.el.tabIndex = k === current ? 0 : -1; b.el.setAttribute("aria-selected", k === current); });
    told.textContent = tell(boxes[current].row);
    if (focus) boxes[current].el.focus();
  }
  map.addEventListener("keydown", e => {
    const to = { ArrowRight: current + 1, ArrowDown: current + 1, ArrowLeft: current - 1, ArrowUp: current - 1, Home: 0, End: boxes.length - 1 }[e.key];
    if (to !== undefined) { e.preventDefault(); e.stopPropagation(); go(to, true); }
  });
  function update(now) {
    const rows = aliveAt(now), width = map.clientWidth || 640, groups = {};
    title.textContent = `Alive at the peak, in ${now.top.name}`;
    map.setAttribute("aria-label", `Setting ${name}: what is alive at the peak, group by group, the largest group first`);
    for (const r of rows) {
      const g = r.kind === "activations" ? r.name.split(".").slice(0, 4).join(".") : r.kind;
      (groups[g] ||= { name: g, kind: r.kind, bytes: 0, rows: [] }).rows.push(r);
      groups[g].bytes += r.bytes;
    }
    boxes = [];
    map.replaceChildren();
    const put = (parent, b, kind, text) => {
      const el = make("div", {}, text);
      el.style.cssText = `left:${b.x}px;top:${b.y}px;width:${b.w}px;height:${b.h}px;background:var(--${kind});color:var(--on-${kind});padding:${text ? "2px 4px" : 0}`;
      parent.append(el);
      return el;
    };
    for (const g of squarify(Object.values(groups).sort((x, y) => y.bytes - x.bytes), 0, 0, width, 300)) {
      const head = g.item.rows.length > 1 && g.h > 34 && g.w > 40 ? 15 : 0;
      if (head) {
        const el = put(map, g, g.item.kind, `${short(g.item.name)} ${size(g.item.bytes)}`);
        el.style.fontWeight = 600;
        el.setAttribute("aria-hidden", true);
      }
      for (const b of squarify(g.item.rows, g.x + (head ? 2 : 0), g.y + (head ? head + 1 : 0), g.w - (head ? 4 : 0), g.h - (head ? head + 3 : 0))) {
        const row = b.item, what = row.kind === "activations" ? row.shape || row.name : row.kind;
        const text = b.w > 84 && b.h > 32 ? `${what} ${size(row.bytes)}` : b.w > 58 && b.h > 15 ? size(row.bytes) : "";
        const el = put(map, b, row.kind, text), i = boxes.push({ el, row }) - 1;
        el.setAttribute("role", "option");
        el.setAttribute("aria-label", tell(row));
        el.addEventListener("pointerenter", () => { told.textContent = tell(row); });
        el.addEventListener("focus", () => go(i, false));
        el.addEventListener("click", () => go(i, true));
      }
    }
    if (boxes.length) go(0, false);
    body.innerHTML = rows.map(r => `<tr><td>${escape(r.name)}</td><td>${escape(r.shape)}</td><td>${size(r.bytes)}</td></tr>`).join("");
  }
  return { box, update };
}

// One setting: its controls, its picture, its cards, its treemap, its words.
function side(book, key, app) {
  const name = key.toUpperCase();
  const panel = controls(book, name, (k, v) => app.change(key, k, v)), plot = chart(name, () => app.toggle(key)), map = treemap(name);
  const big = make("div", { className: "mx-big" }), cards = make("table"), words = make("p", { className: "mx-summary" });
  const ask = make("button", { className: "mx-button", type: "button" }, "Ask the kernel"), answer = make("span");
  const exact = make("div", { className: "mx-exact" }, ask, " ", answer);
  answer.setAttribute("role", "status");
  words.setAttribute("aria-live", "polite");
  ask.addEventListener("click", () => app.ask(key));
  const rows = make("details", {}, make("summary", {}, "The picture as a table")), box = make("section", { className: `mx-side mx-${key}` });
  box.setAttribute("aria-label", `Setting ${name}`);
  box.append(panel.box, big, ...plot.nodes, map.box, cards, exact, words, rows);
  let now;
  const fill = () => {
    rows.querySelector("div")?.remove();
    if (!rows.open) return;
    const holder = make("div", { className: "mx-scroll", tabIndex: 0 });
    holder.innerHTML = `<table><thead><tr><th>module</th>${KINDS.map(k => `<th>${k}</th>`).join("")}<th>together</th></tr></thead><tbody>${now.places.map(p => `<tr><td>${escape(p.name)}</td>${KINDS.map(k => `<td>${p[k] ? size(p[k]) : ""}</td>`).join("")}<td>${size(p.bytes)}</td></tr>`).join("")}</tbody></table>`;
    rows.append(holder);
  };
  rows.addEventListener("toggle", fill);
  function update(s, next, most, top, open) {
    now = next;
    panel.update(s);
    big.innerHTML = `<b>${size(now.top.bytes)}</b><span>at the peak, in ${escape(now.top.name)}</span>`;
    plot.update(book, s, now, most, top, open);
    map.box.hidden = !open;
    if (open) map.update(now);
    cards.innerHTML = `<thead><tr><th>card, less ${size(book.reserve).replace(".0", "")} for its driver</th><th>this setting</th><th>most frames that fit</th></tr></thead><tbody>` + Object.entries(book.cards).map(([card, bytes]) =>
      `<tr><td>${card}</td><td>${fits(book, now.top.bytes, card) ? "fits" : `${size(now.top.bytes + book.reserve - bytes)} too much`}</td><td>${most[card] || "none"}${most[card] === book.models[s.model].frames[1] ? " (all it has encodings for)" : ""}</td></tr>`).join("") + "</tbody>";
    words.textContent = describe(book, s, now);
    fill();
    const [waiting, told] = app.answer(key);
    exact.hidden = !app.live();
    ask.disabled = waiting;
    answer.textContent = told;
  }
  return { box, update };
}

function exercise(book, app) {
  const e = book.exercise, start = make("button", { className: "mx-button", type: "button" }, "Set it up in A"), result = make("p", { className: "mx-verdict" });
  result.setAttribute("role", "status");
  start.addEventListener("click", () => app.set("a", { ...e.start }));
  const box = make("section", { className: "mx-exercise" }, make("h4", {}, "Exercise"), make("p", {}, e.text), start, result);
  box.setAttribute("aria-label", "Exercise");
  return { box, update: s => { result.textContent = verdict(book, s); result.dataset.passed = judge(book, s).passed; } };
}

function render({ model, el }) {
  const book = model.get("book"), open = { a: false, b: false };
  const same = (x, y) => Object.keys(x).every(k => x[k] === y[k]);
  const app = {
    live: () => model.get("live"),
    set(key, s) { model.set(key, s); model.save_changes(); },
    change(key, k, v) {
      const s = { ...model.get(key), [k]: v }, m = book.models[s.model];
      if (k === "model") Object.assign(s, m.start);
      app.set(key, s);
    },
    toggle(key) { open[key] = !open[key]; draw(); },
    ask(key) { model.set("ask", { ...model.get(key) }); model.save_changes(); draw(); },
    answer(key) {
      const s = model.get(key), asked = model.get("ask"), exact = model.get("exact");
      const waiting = Object.keys(asked).length > 0 && !(exact.settings && same(asked, exact.settings));
      if (waiting && same(asked, s)) return [true, "The kernel runs the whole network on shapes alone ..."];
      if (!exact.settings || !same(s, exact.settings)) return [waiting, ""];
      if (exact.error) return [waiting, exact.error];
      const told = forecast(book, s).top.bytes, off = told === exact.peak ? "the same to the byte" : `${(100 * (told / exact.peak - 1)).toFixed(2)} % off`;
      return [waiting, `Traced by the kernel in ${exact.seconds.toFixed(1)} s: ${size(exact.peak)}; this picture is ${off}.`];
    },
  };
  const root = make("div", { className: "mx" }), sides = { a: side(book, "a", app), b: side(book, "b", app) };
  const compare = make("button", { className: "mx-button", type: "button" }, "Compare two settings"), task = book.exercise ? exercise(book, app) : null;
  compare.addEventListener("click", () => app.set("b", Object.keys(model.get("b")).length ? {} : { ...model.get("a") }));
  const both = make("div", { className: "mx-sides" }, sides.a.box, sides.b.box);
  root.append(make("style", {}, STYLE), make("div", { className: "mx-head" }, make("h3", {}, "Where the memory goes"), compare), both);
  if (task) root.append(task.box);
  // Arrow keys are ours here, not JupyterLab's. It respects the attribute only where a shortcut's selector names something around the
  // root; those that name the focused element itself (`:focus`) match before it gets there, so the key ends here as well.
  root.dataset.lmSuppressShortcuts = "true";
  root.addEventListener("keydown", e => { if (!e.ctrlKey && !e.metaKey) e.stopPropagation(); });
  el.append(root);

  let width = 0;
  function draw() {
    const s = { a: model.get("a"), b: model.get("b") }, two = Object.keys(s.b).length > 0;
    compare.setAttribute("aria-pressed", two);
    both.classList.toggle("mx-two", two);
    sides.b.box.hidden = !two;
    const keys = two ? ["a", "b"] : ["a"], now = Object.fromEntries(keys.map(k => [k, forecast(book, s[k])]));
    const peak = Math.max(...keys.map(k => now[k].top.bytes)), above = Math.min(...Object.values(book.cards).map(c => c - book.reserve).filter(c => c > peak), Infinity);
    const top = above <= 2 * peak ? 1.04 * above : 1.12 * peak;
    for (const k of keys) sides[k].update(s[k], now[k], framesThatFit(book, s[k]), top, open[k]);
    if (task) task.update(s.a);
    width = root.clientWidth;
    root.dataset.drawn = Number(root.dataset.drawn || 0) + 1;
  }
  const paint = () => root.classList.toggle("mx-dark", isDark(root));
  const watch = new ResizeObserver(() => { paint(); if (Math.abs(root.clientWidth - width) > 1) draw(); });
  const themes = new MutationObserver(paint), system = matchMedia("(prefers-color-scheme: dark)");
  paint();
  draw();
  watch.observe(root);
  themes.observe(document.body, { attributes: true, attributeFilter: ["class", "style", "data-jp-theme-light", "data-jp-theme-name"] });
  system.addEventListener("change", paint);
  const traits = ["a", "b", "ask", "exact", "live"].map(t => `change:${t}`);
  traits.forEach(t => model.on(t, draw));
  return () => { traits.forEach(t => model.off(t, draw)); watch.disconnect(); themes.disconnect(); system.removeEventListener("change", paint); };
}

// The same without a kernel, for the page that to_html() writes: `state` has the traits.
export function openPage(el, state) {
  const heard = {};
  const model = {
    get: key => state[key],
    set(key, value) {
      if (JSON.stringify(state[key]) === JSON.stringify(value)) return;
      state[key] = value;
      (heard[`change:${key}`] || []).forEach(f => f());
    },
    save_changes() {},
    on(event, f) { (heard[event] ||= []).push(f); },
    off(event, f) { heard[event] = (heard[event] || []).filter(g => g !== f); },
  };
  return render({ model, el });
}

export default { render };
