// The attention explorer of chapter 11: one plain ES module, no dependencies, no build step, no network.
// anywidget calls render({ model, el }) with its model. The page that to_html() writes holds this same file
// and calls openPage(), which makes a model out of what the page stores. A model is asked for data by a key,
// such as "layer/3/12", and answers with a small object and bytes; attention_maps.py says what each key holds.

const MEASURES = {
  entropy: { label: "Entropy", unit: "nats", digits: 2, tip: "How spread out a row is: 0 is one single frame" },
  reach: { label: "Reach", unit: "frames", digits: 2, tip: "How many frames away the weight lies, on average" },
  diagonal: { label: "Own share", unit: "of the weight", digits: 2, tip: "The share of the weight that a frame gives to itself" },
};
const ORDERS = { network: "Network", rising: "Low first", falling: "High first" };
const PANELS = { heads: "Layers and heads", follow: "Follow one number", what: "What if", known: "Known answers", help: "How to read" };
const STATE = ["layer", "head", "step", "pixel", "other", "frame", "key_frame", "locked", "measure", "overlay", "order", "panel", "switches", "presets"];

// ---- colours: viridis from 17 of its colours
const ANCHORS = "44015448186a472d7b4240863b528b33638d2c728e26828e21918c1fa08828ae803fbc735ec96284d44baddc30d8e219fde725".match(/.{6}/g)
  .map((h) => [0, 2, 4].map((i) => parseInt(h.slice(i, i + 2), 16)));
function colour(t) {
  const x = Math.min(Math.max(t || 0, 0), 1) * (ANCHORS.length - 1), i = Math.min(Math.floor(x), ANCHORS.length - 2);
  return ANCHORS[i].map((c, n) => Math.round(c + (x - i) * (ANCHORS[i + 1][n] - c)));
}
const pack = (r, g, b) => ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;         // one pixel of a canvas as one number
const LUT = Array.from({ length: 256 }, (_, i) => pack(...colour(i / 255)));

function fill(canvas, height, width, at) {
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d"), image = context.createImageData(width, height), out = new Uint32Array(image.data.buffer);
  for (let n = 0; n < out.length; n++) out[n] = at(n);
  context.putImageData(image, 0, 0);
}
function paint(canvas, values, rows, cols, low, high) {
  const factor = 255 / (high - low || 1);
  fill(canvas, rows, cols, (n) => LUT[Math.round(Math.min(Math.max((values[n] - low) * factor, 0), 255))]);
}
function paintFrame(canvas, film, frame, height, width) {
  const from = frame * height * width * 3;
  fill(canvas, height, width, (n) => pack(film[from + 3 * n], film[from + 3 * n + 1], film[from + 3 * n + 2]));
}

// ---- small helpers
function h(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "polyline", "rect", "circle", "text"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((c) => c !== null && c !== undefined));
  return node;
}
const bytesOf = (b) => (!b ? new Uint8Array() : b instanceof Uint8Array ? b : new Uint8Array(b.buffer || b, b.byteOffset || 0, b.byteLength));
const floats = (bytes, start, count) => new Float32Array(bytes.slice(start, start + 4 * count).buffer);
const icon = (path) => h("svg", { viewBox: "0 0 16 16", width: 14, height: 14, "aria-hidden": "true" }, h("path", { d: path, fill: "currentColor" }));
const ICONS = { play: "M4 2.5v11l9-5.5z", pause: "M4 3h3v10H4zM9 3h3v10H9z", back: "M10.5 3v10L4 8z", on: "M5.5 3v10L12 8z" };
const num = (x, digits = 2) => (Math.abs(x) < 0.5 * 10 ** -digits ? 0 : x).toFixed(digits).replace("-", "−");
const clamp = (x, low, high) => Math.min(Math.max(x, low), high);
const sum = (values) => values.reduce((a, b) => a + b, 0);
const same = (a, b) => JSON.stringify(a ?? null) === JSON.stringify(b ?? null);
// Python's json.dumps(..., sort_keys=True, separators=(",", ":")), so that both name a run by the same key.
const canonical = (x) => (Array.isArray(x) ? `[${x.map(canonical)}]` : x && typeof x === "object"
  ? `{${Object.keys(x).sort().map((k) => `${JSON.stringify(k)}:${canonical(x[k])}`)}}` : JSON.stringify(x));

function radios(name, options, choose) {                         // a row of buttons of which one is on; arrow keys move
  const buttons = Object.entries(options).map(([value, o]) => h("button", {
    type: "button", role: "radio", title: o.tip, "data-value": value, onclick: () => choose(value) }, o.label ?? o));
  const el = h("div", { role: "radiogroup", "aria-label": name, class: "seg", onkeydown: (event) => {
    const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!by) return;
    const next = buttons[(buttons.indexOf(event.target) + by + buttons.length) % buttons.length];
    event.preventDefault(); next.focus(); choose(next.dataset.value);
  } }, buttons);
  return { el, update: (value) => buttons.forEach((b) => {
    b.setAttribute("aria-checked", b.dataset.value === value); b.tabIndex = b.dataset.value === value ? 0 : -1; }) };
}
const labelled = (text, ...nodes) => h("div", { class: "field" }, h("span", { class: "label" }, text), ...nodes);

function matrixView(name, { onhover, onpick, onkey }) {           // an f × f matrix with a marked row and a marked cell
  const canvas = h("canvas"), row = h("div", { class: "row" }), cell = h("div", { class: "cell" });
  const at = (event) => {
    const box = canvas.getBoundingClientRect(), n = canvas.width;
    return [event.clientY - box.top, event.clientX - box.left].map((x) => clamp(Math.floor((x / box.width) * n), 0, n - 1));
  };
  const plot = h("div", { class: "plot", tabindex: 0, role: "group", "aria-roledescription": "attention matrix",
    onmousemove: (e) => onhover(...at(e)), onmouseleave: () => onhover(null, null), onclick: (e) => onpick(...at(e)), onkeydown: onkey }, canvas, row, cell);
  const title = h("div", { class: "title" }), last = h("span");
  const el = h("figure", { class: "matrix" }, title, h("div", { class: "axes" },
    h("span", { class: "y" }, "query frame"), plot, h("span", { class: "x" }, h("span", {}, "0"), h("span", {}, "key frame"), last)));
  return { el, plot, update(values, f, top, i, j, text) {
    el.hidden = !values;
    if (!values) return;
    paint(canvas, values, f, f, 0, top);
    title.textContent = text; last.textContent = f - 1;
    row.style.cssText = `top:${(100 * i) / f}%;height:${100 / f}%`;
    cell.style.cssText = `top:${(100 * i) / f}%;left:${(100 * j) / f}%;height:${100 / f}%;width:${100 / f}%`;
    plot.setAttribute("aria-label", `${name}, ${text}: row ${i}, column ${j}, weight ${num(values[i * f + j] / 255)}. Arrow keys move.`);
  } };
}

function bars(values, { mark = -1, height = 54, signed = true, names = (n) => n, digits = 2 } = {}) {      // bars from a base line
  const top = Math.max(...values.map(Math.abs)) || 1, width = 10 * values.length, zero = signed ? height / 2 : height;
  const el = h("svg", { viewBox: `0 0 ${width} ${height}`, class: "bars", preserveAspectRatio: "none", "aria-hidden": "true" });
  values.forEach((v, n) => {
    const size = (Math.abs(v) / top) * (signed ? height / 2 - 1 : height - 1);
    const bar = h("rect", { x: 10 * n + 1.5, width: 7, y: v < 0 ? zero : zero - size, height: Math.max(size, 0.5), class: n === mark ? "mark" : mark >= 0 ? "rest" : "" });
    const tip = document.createElementNS("http://www.w3.org/2000/svg", "title");
    tip.textContent = `${names(n)}: ${num(v, digits)}`;
    bar.append(tip); el.append(bar);
  });
  el.append(h("line", { x1: 0, x2: width, y1: zero, y2: zero, class: "base" }));
  return el;
}

// ---- the data: what is known is kept, what is missing is asked for
function dataOf(model, redraw) {
  const known = new Map(), asked = new Map();
  const listen = (message, buffers) => {
    if (!message || message.key === undefined) return;
    asked.delete(message.key);
    known.set(message.key, { ...message, bytes: bytesOf(buffers && buffers[0]) });
    redraw();
  };
  model.on("msg:custom", listen);
  return {
    get: (key) => known.get(key),
    ask(key) {
      if (!known.has(key) && !asked.has(key)) { asked.set(key, performance.now()); model.send({ ask: key }); }
      return known.get(key);
    },
    forget: (key) => known.delete(key),
    waiting: (key) => asked.has(key),
    close: () => model.off("msg:custom", listen),
  };
}

// ---- the explorer
function render({ model, el }) {
  const info = model.get("info"), film = bytesOf(model.get("film")), means = bytesOf(model.get("means")), live = model.get("live");
  const { frames: F, height: H, width: W, layers, steps } = info, [GH, GW] = info.grid;
  const get = (name) => model.get(name);
  const set = (changes) => { for (const [name, value] of Object.entries(changes)) model.set(name, value); model.save_changes(); };
  const local = { hover: null, hoverKey: null, cursor: null, timer: null, asked: null, shown: null, said: "" };
  let scheduled = false;
  const redraw = () => { if (!scheduled) { scheduled = true; requestAnimationFrame(() => { scheduled = false; draw(); }); } };
  const data = dataOf(model, redraw);

  // -- what is selected
  const layerIndex = () => Math.max(layers.findIndex((l) => l.name === get("layer")), 0);
  const layer = () => layers[layerIndex()];
  const stepIndex = () => Math.max(steps.findIndex((s) => s.step === get("step")), 0);
  const head = () => Math.min(get("head"), layer().heads - 1);
  const query = () => local.hover ?? get("frame");
  const key = () => local.hoverKey ?? get("key_frame");
  const inLayer = (pixel) => [Math.floor((pixel[0] * layer().height) / GH), Math.floor((pixel[1] * layer().width) / GW)];
  const perStep = sum(layers.map((l) => l.heads * F * F));
  const starts = layers.map((_, n) => sum(layers.slice(0, n).map((l) => l.heads * F * F)));
  const meanMap = (l, k, s = stepIndex(), from = means) => from.subarray(s * perStep + starts[l] + k * F * F, s * perStep + starts[l] + (k + 1) * F * F);
  const layerKey = (s = get("step")) => `layer/${layerIndex()}/${s}`;
  const score = (l, k, s = stepIndex(), m = get("measure")) => info.scores[m][s][l][k];
  function chunk(s) {                                                       // scalar maps, and the maps of the recorded pixels
    const answer = data.ask(layerKey(s)), { heads, height, width } = layer();
    if (!answer || answer.error) return null;
    const count = 3 * heads * height * width;
    answer.scalars ??= floats(answer.bytes, 0, count);
    return { scalars: answer.scalars, maps: answer.bytes.subarray(4 * count), pixels: answer.pixels };
  }
  function pixelMap(pixel, k) {
    const found = chunk(), [y, x] = inLayer(pixel);
    const n = found ? found.pixels.findIndex((p) => p[0] === y && p[1] === x) : -1;
    return n < 0 ? null : found.maps.subarray((n * layer().heads + k) * F * F, (n * layer().heads + k + 1) * F * F);
  }
  const scalarMap = (m, k) => { const c = chunk(), size = layer().height * layer().width, n = Object.keys(MEASURES).indexOf(m) * layer().heads + k;
    return c && c.scalars.subarray(n * size, (n + 1) * size); };
  const scalarAt = (m, pixel) => { const c = scalarMap(m, head()), [y, x] = inLayer(pixel); return c ? c[y * layer().width + x] : NaN; };
  const mapOf = (pixel, k) => (pixel ? pixelMap(pixel, k) : meanMap(layerIndex(), k));
  const known = (pixel) => !pixel || pixelMap(pixel, head()) !== null;

  // -- what the words say
  function looks(values, i) {
    const row = Array.from(values.subarray(i * F, (i + 1) * F));
    const best = row.map((_, j) => j).sort((a, b) => row[b] - row[a] || a - b);
    return `frame ${i} looks most at frame ${best[0]} (${num(row[best[0]] / 255)})` + (F > 1 ? `, then at frame ${best[1]} (${num(row[best[1]] / 255)})` : "");
  }
  function summary(i = query()) {
    const a = get("pixel"), b = get("other"), values = mapOf(a, head()), at = steps[stepIndex()];
    const where = a ? `pixel (${inLayer(a)})`.replace(",", ", ") : "mean over all pixels";
    const means3 = Object.keys(MEASURES).map((m) => (a ? scalarAt(m, a) : score(layerIndex(), head(), stepIndex(), m)));
    let text = `${layer().label}, head ${head()}, step ${stepIndex() + 1} of ${steps.length} (t = ${at.timestep}), ${where}: `;
    if (!values) return text + (data.waiting(layerKey()) ? "loading." : "not recorded.");
    text += `${looks(values, i)}. Over all frames: entropy ${num(means3[0])} of at most ${num(Math.log(F))} nats, reach ${num(means3[1])} frames, own frame ${num(means3[2])} of the weight.`;
    const other = b && mapOf(b, head());
    if (!other) return text;
    const apart = sum(Array.from(values, (v, n) => Math.abs(v - other[n]))) / 255 / 2 / F;
    return text + ` Pixel B (${inLayer(b).join(", ")}): ${looks(other, i)}; ${num(100 * apart, 0)} % of the weight lies elsewhere than at A.`;
  }
  const say = (text) => { if (text !== local.said) { local.said = text; alert.textContent = text; } };

  // -- actions
  const setFrame = (i) => { local.hover = null; set({ frame: clamp(i, 0, F - 1), locked: true }); };
  const setStep = (n) => set({ step: steps[clamp(n, 0, steps.length - 1)].step });
  function play(on) {
    clearInterval(local.timer); local.timer = null;
    if (on) local.timer = setInterval(() => {
      if (data.waiting(layerKey())) return;                                  // wait for the picture before the next step
      if (!el.isConnected) return play(false);
      setStep((stepIndex() + 1) % steps.length);
    }, 350);
    redraw();
  }
  function pick(y, x, second) {
    const here = [clamp(y, 0, GH - 1), clamp(x, 0, GW - 1)], a = get("pixel"), b = get("other");
    local.cursor = here;
    if (second ?? (a && !b && !same(a, here))) set({ other: here });
    else set({ pixel: here, other: null });
    say(`Pixel ${get("other") ? "B" : "A"} is row ${here[0]}, column ${here[1]}.`);
  }
  const clear = () => { set({ pixel: null, other: null }); say("No pixel: the mean over all pixels."); };
  function moveCell(event) {
    const by = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (event.key === "Enter") set({ panel: "follow" });
    if (!by) return;
    event.preventDefault();
    local.hover = local.hoverKey = null;
    set({ frame: clamp(get("frame") + by[0], 0, F - 1), key_frame: clamp(get("key_frame") + by[1], 0, F - 1), locked: true });
    say(`Frame ${get("frame")} gives frame ${get("key_frame")} ${num((mapOf(get("pixel"), head()) || meanMap(layerIndex(), head()))[get("frame") * F + get("key_frame")] / 255)}.`);
  }
  const onmatrix = { onkey: moveCell,
    onhover: (i, j) => { if (get("locked") && i !== null) { local.hoverKey = null; return; } local.hover = i; local.hoverKey = j; redraw(); },
    onpick: (i, j) => { local.hover = local.hoverKey = null; set({ frame: i, key_frame: j, locked: true }); } };

  // -- the parts: head line and tools
  const alert = h("div", { class: "sr", "aria-live": "polite", role: "status" });
  const layerSelect = h("select", { "aria-label": "Layer", onchange: (e) => set({ layer: e.target.value }) }, layers.map((l) => h("option", { value: l.name }, l.label)));
  const slider = h("input", { type: "range", min: 0, max: steps.length - 1, step: 1, "aria-label": "Denoising step", oninput: (e) => setStep(+e.target.value) });
  const playButton = h("button", { type: "button", class: "icon", onclick: () => play(!local.timer) });
  const stepText = h("output", { class: "value" });
  const measure = radios("Measure", MEASURES, (m) => set({ measure: m }));
  const overlay = h("button", { type: "button", class: "toggle", onclick: () => set({ overlay: !get("overlay") }) }, "Lay over the frame");
  const tools = h("div", { class: "tools" },
    labelled("Layer", layerSelect),
    labelled("Denoising step", h("div", { class: "line" }, playButton,
      h("button", { type: "button", class: "icon", "aria-label": "Previous step", onclick: () => setStep(stepIndex() - 1) }, icon(ICONS.back)), slider,
      h("button", { type: "button", class: "icon", "aria-label": "Next step", onclick: () => setStep(stepIndex() + 1) }, icon(ICONS.on)), stepText)),
    labelled("Measure", h("div", { class: "line" }, measure.el, overlay)));

  // -- the film strip
  const cells = Array.from({ length: F }, (_, i) => {
    const canvas = h("canvas"), bar = h("i"), weight = h("b");
    paintFrame(canvas, film, i, H, W);
    const button = h("button", { type: "button", role: "radio", class: "frame",
      onmouseenter: () => { if (!get("locked")) { local.hover = i; redraw(); } },
      onclick: () => { local.hover = null; if (get("locked") && get("frame") === i) set({ locked: false }); else setFrame(i); } },
    canvas, h("span", { class: "bar" }, bar), weight, h("span", { class: "n" }, String(i)));
    return { button, canvas, bar, weight };
  });
  const strip = h("div", { class: "strip", role: "radiogroup", "aria-label": "Film strip: the frame that asks",
    style: `--frames:${F}`, onmouseleave: () => { local.hover = null; redraw(); },
    onkeydown: (event) => {
      const by = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1, Home: -F, End: F }[event.key];
      if (event.key === "Escape") set({ locked: false });
      if (!by) return;
      event.preventDefault(); setFrame(get("frame") + by); cells[get("frame")].button.focus(); say(summary(get("frame")));
    } }, cells.map((c) => c.button));
  const stripText = h("p", { class: "hint" });

  // -- the picture with its pixels
  const picture = h("canvas"), heat = h("canvas", { class: "heat" }), marks = h("div", { class: "marks" });
  const stageAt = (event) => { const box = stage.getBoundingClientRect(); return [Math.floor(((event.clientY - box.top) / box.height) * GH), Math.floor(((event.clientX - box.left) / box.width) * GW)]; };
  const stage = h("div", { class: "stage", tabindex: 0, role: "group", "aria-roledescription": "pixel picker", style: `aspect-ratio:${W}/${H}`,
    onclick: (e) => pick(...stageAt(e), e.shiftKey ? true : undefined),
    onkeydown: (event) => {
      const by = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      const here = local.cursor ?? get("pixel") ?? [GH >> 1, GW >> 1];
      if (by) { local.cursor = [clamp(here[0] + by[0], 0, GH - 1), clamp(here[1] + by[1], 0, GW - 1)]; say(`Row ${local.cursor[0]}, column ${local.cursor[1]}.`); redraw(); }
      else if (event.key === "Enter" || event.key === " ") pick(...here, event.shiftKey ? true : undefined);
      else if (event.key === "Escape") clear();
      else return;
      event.preventDefault();
    } }, picture, heat, marks);
  const clearButton = h("button", { type: "button", onclick: clear }, "Clear pixels");
  const stageText = h("p", { class: "hint" }), stageTitle = h("div", { class: "title" });
  const scaleLow = h("span"), scaleHigh = h("span");
  const scale = h("div", { class: "scale" }, scaleLow, h("span", { class: "ramp" }), scaleHigh);
  const left = h("div", { class: "left" }, stageTitle, stage, scale, stageText, clearButton);

  // -- the matrices
  const matrixA = matrixView("Matrix", onmatrix), matrixB = matrixView("Second matrix", onmatrix);
  const topA = h("span"), missing = h("p", { class: "hint" });
  const pair = h("div", { class: "pair" }, matrixA.el, matrixB.el);
  const middle = h("div", {}, pair, missing, h("div", { class: "scale indent" }, h("span", {}, "weight 0"), h("span", { class: "ramp" }), topA));
  const headRow = h("div", { class: "headrow", role: "radiogroup", "aria-label": "Head", onkeydown: (event) => {
    const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!by) return;
    event.preventDefault(); set({ head: (head() + by + layer().heads) % layer().heads }); headRow.children[head()].focus();
  } });
  const chart = h("div", { class: "chart" });
  const right = h("div", { class: "right" }, h("div", { class: "title" }, "Heads of this layer"), headRow, chart);
  const text = h("p", { class: "summary" });

  // -- layers and heads
  const order = radios("Order", ORDERS, (o) => set({ order: o }));
  const tiles = layers.flatMap((l, n) => Array.from({ length: l.heads }, (_, k) => {
    const [, block, kind] = l.label.match(/^(.*?)(?: (\S+))?$/);
    const canvas = h("canvas"), value = h("b");
    const button = h("button", { type: "button", class: "tile", "data-layer": n, "data-head": k, onclick: () => set({ layer: l.name, head: k }) },
      canvas, value, h("span", {}, block), h("span", {}, `${kind ?? ""} · ${k}`));
    return { l: n, k, canvas, value, button };
  })).sort((a, b) => a.k - b.k || a.l - b.l);                                // a column for each layer, a row for each head
  const grid = h("div", { class: layers.length > 16 ? "tiles" : "tiles square", style: `--layers:${layers.length}` });
  const headsPanel = h("div", {}, h("div", { class: "line" }, h("span", { class: "label" }, "Order"), order.el,
    h("span", { class: "hint" }, "A tile is the mean over all pixels, in a scale of its own; below it the measure, the layer and the head.")), grid);

  // -- follow one number
  const stepper = (name, trait) => {
    const value = h("output", { class: "value" }), move = (by) => () => { local.hover = local.hoverKey = null; set({ [trait]: clamp(get(trait) + by, 0, F - 1), locked: true }); };
    return { value, el: labelled(name, h("div", { class: "line" },
      h("button", { type: "button", class: "icon", "aria-label": `${name}: one less`, onclick: move(-1) }, icon(ICONS.back)), value,
      h("button", { type: "button", class: "icon", "aria-label": `${name}: one more`, onclick: move(1) }, icon(ICONS.on)))) };
  };
  const stepQuery = stepper("Query frame", "frame"), stepKey = stepper("Key frame", "key_frame");
  const chain = h("div", { class: "chain" });
  const followPanel = h("div", {}, h("div", { class: "line" }, stepQuery.el, stepKey.el, h("span", { class: "hint" }, "or click a cell of the matrix")), chain);

  // -- what if
  const change = (changes) => { const next = { ...get("switches") }; for (const [k, v] of Object.entries(changes)) { if (v === null) delete next[k]; else next[k] = v; } set({ switches: next }); };
  const flip = (name) => h("button", { type: "button", class: "toggle", disabled: !live, "data-switch": name, onclick: () => change({ [name]: get("switches")[name] ? null : name === "shuffle_frames" ? info.shuffle : true }) },
    { shuffle_frames: "Shuffle the frames", drop_position: "Drop the position encoding" }[name]);
  const flips = ["shuffle_frames", "drop_position"].map(flip);
  const choice = (name, label, values, shown) => h("select", { "aria-label": label, disabled: !live, "data-switch": name, onchange: (e) => change({ [name]: e.target.value === "" ? null : +e.target.value }) },
    values.map((v) => h("option", { value: v ?? "" }, shown(v))));
  const windowSelect = choice("window", "Window", [null, 0, 1, 2, 4, 8].filter((v) => v === null || v < F), (v) => (v === null ? "all frames" : v === 0 ? "own frame only" : `${v} frame${v > 1 ? "s" : ""} each way`));
  const heatSelect = choice("temperature", "Temperature", [null, 0.25, 0.5, 2, 4, 100], (v) => (v === null ? "1, as trained" : String(v)));
  const zeroButton = h("button", { type: "button", class: "toggle", disabled: !live, "data-switch": "zero_heads", onclick: () => {
    const now = get("switches").zero_heads || [], mine = [layer().name, head()], rest = now.filter((z) => !same(z, mine));
    const next = rest.length === now.length ? [...now, mine] : rest;
    change({ zero_heads: next.length ? next : null });
  } });
  const runButton = h("button", { type: "button", class: "go", disabled: !live, onclick: () => { local.asked = `run/${canonical(get("switches"))}`; if (data.get(local.asked)?.error) data.forget(local.asked); data.ask(local.asked); say("Running."); redraw(); } }, "Run again");
  const resetButton = h("button", { type: "button", disabled: !live, onclick: () => set({ switches: {} }) }, "Reset");
  const stored = h("div", { class: "line stored" }), result = h("div", { class: "result" });
  const whatPanel = h("div", {},
    h("div", { class: "line switches" }, flips, labelled("Each frame sees", windowSelect), labelled("Temperature", heatSelect), zeroButton, runButton, resetButton),
    h("p", { class: "hint" }, live ? "The switches run the model again with the same starting noise." : "The switches need a kernel: open the chapter to use them. This page stores a few runs."), stored, result);

  // -- known answers, and how to read
  const knownPanel = h("div");
  const helpPanel = h("div", { class: "help" }, [
    "One row of a matrix is one frame that asks; its columns are the frames that it may listen to, and the row sums to one. Every pixel has a matrix of its own, for every head, layer and denoising step.",
    "Film strip: hover a frame to see whom it listens to, click to hold it, click again to let go; the left and right arrow keys step. Frames with little weight fade.",
    "Picture: click a pixel for its own matrix, click another one to compare. With the keyboard: arrow keys move, Enter picks, Shift and Enter picks the second, Escape clears. Without a pixel, the mean over all pixels is shown.",
    "Layers and heads: every head of every layer at this step, in the order of the network or of the measure. The curve shows the measure over the denoising steps.",
    "What a map does not prove: a large weight says where a head reads, not what that does to the picture. To claim that a head matters, zero it under “What if” and look at the difference, over many clips.",
  ].map((t) => h("p", {}, t)));

  const panelOf = { heads: headsPanel, follow: followPanel, what: whatPanel, known: knownPanel, help: helpPanel };
  const names = Object.keys(PANELS);
  const tabs = names.map((p) => h("button", { type: "button", role: "tab", "data-panel": p, onclick: () => set({ panel: p }) }, PANELS[p]));
  const tabList = h("div", { class: "tabs", role: "tablist", "aria-label": "Views", onkeydown: (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by) return;
    const next = (names.indexOf(get("panel")) + by + names.length) % names.length;
    event.preventDefault(); set({ panel: names[next] }); tabs[next].focus();
  } }, tabs);
  names.forEach((p) => { panelOf[p].setAttribute("role", "tabpanel"); panelOf[p].setAttribute("aria-label", PANELS[p]); });

  const root = h("section", { class: "attention-explorer", "aria-label": `Attention explorer: ${info.caption}`, "data-lm-suppress-shortcuts": "true",
    onkeydown: (event) => { if (!event.ctrlKey && !event.metaKey) event.stopPropagation(); } },    // a shortcut for `:focus` does not see the attribute
    h("style", {}, CSS),
    h("header", {}, h("div", {}, h("div", { class: "label" }, "Attention explorer"), h("div", { class: "name" }, info.caption || "a clip")),
      h("div", { class: "label" }, `${F} frames · ${layers.length} layers · ${steps.length} steps · ${live ? "with a kernel" : "stored page"}`)),
    tools, h("div", { class: "film" }, stripText, strip), h("div", { class: "main" }, left, middle, right), text, tabList,
    h("div", { class: "panels" }, names.map((p) => panelOf[p])), alert);
  el.replaceChildren(root);

  // -- drawing
  const drawn = {};
  function drawStrip(values) {
    const i = query(), row = Array.from(values.subarray(i * F, (i + 1) * F)), top = Math.max(...row) || 1;
    cells.forEach(({ button, canvas, bar, weight }, j) => {
      canvas.style.opacity = 0.22 + (0.78 * row[j]) / top;
      bar.style.height = `${(100 * row[j]) / top}%`;
      weight.textContent = num(row[j] / 255);
      button.classList.toggle("asks", j === i);
      button.setAttribute("aria-checked", j === i);
      button.tabIndex = j === get("frame") ? 0 : -1;
      button.setAttribute("aria-label", `Frame ${j}, weight ${num(row[j] / 255)}${j === i ? ", asks" : ""}`);
    });
    strip.classList.toggle("locked", get("locked"));
    stripText.textContent = get("locked") ? `Frame ${i} asks, and is held. Click it again to let go.` : `Frame ${i} asks. The brighter a frame, the more it listens to it. Click to hold.`;
  }
  function drawStage() {
    const i = query(), { height, width } = layer(), m = get("measure"), values = get("overlay") ? scalarMap(m, head()) : null;
    paintFrame(picture, film, i, H, W);
    heat.hidden = !values; scale.style.visibility = values ? "visible" : "hidden";
    if (values) {
      const low = Math.min(...values), high = Math.max(...values);
      paint(heat, values, height, width, low, high);
      scaleLow.textContent = `${MEASURES[m].label} ${num(low)}`; scaleHigh.textContent = num(high);
    }
    marks.style.setProperty("--cells", `${GW}`);
    const box = (pixel, name) => h("div", { class: `pixel ${name.toLowerCase()}`, style: `top:${(100 * inLayer(pixel)[0]) / height}%;left:${(100 * inLayer(pixel)[1]) / width}%;height:${100 / height}%;width:${100 / width}%` }, h("span", {}, name));
    marks.replaceChildren(...[[get("pixel"), "A"], [get("other"), "B"]].filter(([p]) => p).map(([p, name]) => box(p, name)),
      ...(local.cursor && document.activeElement === stage ? [h("div", { class: "cursor", style: `top:${(100 * local.cursor[0]) / GH}%;left:${(100 * local.cursor[1]) / GW}%;height:${100 / GH}%;width:${100 / GW}%` })] : []));
    stageTitle.textContent = `Frame ${i}${values ? ` and the ${MEASURES[m].label.toLowerCase()}` : ""}`;
    stageText.textContent = !get("pixel") ? "Click a pixel for its own matrix." : get("other") ? "A and B are compared. Click to begin anew." : "Click a second pixel to compare.";
    clearButton.hidden = !get("pixel");
    stage.setAttribute("aria-label", `Frame ${i}, ${GH} by ${GW} pixels of the latents. Pixel A ${get("pixel") ?? "none"}, pixel B ${get("other") ?? "none"}. Arrow keys move, Enter picks A, Shift and Enter picks B, Escape clears.`);
  }
  function drawMatrices() {
    const a = get("pixel"), b = get("other"), heads = Array.from({ length: layer().heads }, (_, k) => k);
    const of = (pixel) => heads.map((k) => mapOf(pixel, k));
    let mapsA = of(a), mapsB = b ? of(b) : heads.map(() => null);
    const lost = !mapsA[0];
    missing.textContent = !lost ? "" : data.waiting(layerKey()) ? "" : "This pixel was not recorded: the mean over all pixels is shown.";
    if (lost) mapsA = of(null);
    const top = Math.max(...[...mapsA, ...mapsB].filter(Boolean).map((v) => Math.max(...v))) || 1;
    topA.textContent = num(top / 255);
    pair.classList.toggle("two", !!mapsB[head()]);
    const i = query(), j = key(), say2 = (v) => (v ? ` · ${i} → ${j}: ${num(v[i * F + j] / 255)}` : "");
    matrixA.update(mapsA[head()], F, top, i, j, `${a && !lost ? "Pixel A" : "All pixels"}${say2(mapsA[head()])}`);
    matrixB.update(mapsB[head()], F, top, i, j, `Pixel B${say2(mapsB[head()])}`);
    if (headRow.children.length !== heads.length)
      headRow.replaceChildren(...heads.map((k) => h("button", { type: "button", role: "radio", class: "thumb", onclick: () => set({ head: k }) }, h("canvas"), h("canvas"), h("span"))));
    heads.forEach((k) => {
      const button = headRow.children[k], [ca, cb, label] = button.children;
      paint(ca, mapsA[k], F, F, 0, top);
      cb.hidden = !mapsB[k];
      if (mapsB[k]) paint(cb, mapsB[k], F, F, 0, top);
      label.textContent = `${k}`;
      button.setAttribute("aria-checked", k === head()); button.tabIndex = k === head() ? 0 : -1;
      button.setAttribute("aria-label", `Head ${k}`);
    });
    return mapsA[head()];
  }
  function drawHeads() {
    const m = get("measure"), o = get("order"), now = `${m} ${o} ${stepIndex()} ${layerIndex()} ${head()}`;
    if (drawn.heads === now) return;                                          // a hover changes nothing here
    drawn.heads = now;
    const value = (t) => score(t.l, t.k);
    const sorted = o === "network" ? tiles : [...tiles].sort((a, b) => (o === "rising" ? value(a) - value(b) : value(b) - value(a)) || a.l - b.l || a.k - b.k);
    if (sorted.some((t, n) => grid.children[n] !== t.button)) grid.replaceChildren(...sorted.map((t) => t.button));
    tiles.forEach((t) => {
      const values = meanMap(t.l, t.k), on = t.l === layerIndex() && t.k === head();
      paint(t.canvas, values, F, F, 0, Math.max(...values));
      t.value.textContent = num(value(t));
      t.button.setAttribute("aria-pressed", on);
      t.button.setAttribute("aria-label", `${layers[t.l].label}, head ${t.k}: ${MEASURES[m].label.toLowerCase()} ${num(value(t))}`);
    });
  }
  function drawChart(m = get("measure")) {
    const all = info.scores[m].flat(2), low = Math.min(...all), high = Math.max(...all), n = steps.length, w = 300, t = 132;
    const x = (s) => 34 + ((w - 44) * s) / Math.max(n - 1, 1), y = (v) => 10 + (t - 34) * (1 - (v - low) / (high - low || 1));
    const line = (k, cls) => h("polyline", { class: cls, points: steps.map((_, s) => `${x(s).toFixed(1)},${y(score(layerIndex(), k, s)).toFixed(1)}`).join(" ") });
    const others = Array.from({ length: layer().heads }, (_, k) => k).filter((k) => k !== head()), now = stepIndex();
    const svg = h("svg", { viewBox: `0 0 ${w} ${t}`, role: "img", "aria-label": `${MEASURES[m].label} of head ${head()} over the steps, from ${num(score(layerIndex(), head(), 0))} to ${num(score(layerIndex(), head(), n - 1))}` },
      h("line", { x1: 34, x2: w - 10, y1: t - 22, y2: t - 22, class: "base" }), others.map((k) => line(k, "other")), line(head(), "mine"),
      h("line", { x1: x(now), x2: x(now), y1: 8, y2: t - 22, class: "now" }), h("circle", { cx: x(now), cy: y(score(layerIndex(), head())), r: 3.5 }),
      h("text", { x: 30, y: 14, "text-anchor": "end" }, num(high)), h("text", { x: 30, y: t - 22, "text-anchor": "end" }, num(low)),
      h("text", { x: 34, y: t - 8 }, `t = ${steps[0].timestep}`), h("text", { x: w - 10, y: t - 8, "text-anchor": "end" }, `t = ${steps[n - 1].timestep}`));
    chart.replaceChildren(h("div", { class: "title" }, `${MEASURES[m].label} in ${MEASURES[m].unit}, step by step`), svg,
      h("p", { class: "hint" }, `${layer().label}: head ${head()} thick, its other heads thin.`));
  }
  function drawFollow() {
    const i = get("frame"), j = get("key_frame"), pixel = get("pixel") ?? info.follow[0], at = pixel && inLayer(pixel);
    stepQuery.value.textContent = i; stepKey.value.textContent = j;
    const name = at && `follow/${layerIndex()}/${get("step")}/${at[0]}/${at[1]}/${head()}`, answer = name && data.ask(name);
    if (!answer || answer.error) {
      const others = info.follow.filter((p) => !same(p, pixel));
      return chain.replaceChildren(h("p", { class: "hint" }, answer?.error || "Loading."),
        ...(answer?.error && !live ? others.map((p) => h("button", { type: "button", onclick: () => set({ pixel: p, other: null }) }, `Go to pixel (${p.join(", ")})`)) : []));
    }
    const d = answer.width, all = floats(answer.bytes, 0, 2 * F * d), part = (start) => Array.from(all.subarray(start, start + d));
    const q = part(i * d), k = part((F + j) * d), products = q.map((v, n) => v * k[n]), dot = sum(products), root = Math.sqrt(d);
    const scores = Array.from({ length: F }, (_, n) => sum(part((F + n) * d).map((v, c) => v * q[c])) / root);
    const peak = Math.max(...scores), raised = scores.map((s) => Math.exp(s - peak)), weights = raised.map((v) => v / sum(raised));
    const recorded = mapOf(pixel, head()), stored = recorded && recorded[i * F + j] / 255, agrees = recorded && Math.abs(stored - weights[j]) <= 0.003;
    const { height, width, heads } = layer(), c = heads * d;
    const stage5 = (n, title, shape, body, words) => h("div", { class: "stage5" }, h("div", { class: "title" }, h("b", {}, n), title), h("code", {}, shape), body, h("p", {}, words));
    chain.replaceChildren(
      h("p", { class: "hint" }, `${layer().label}: x (b c f h w) → tokens ((b h w) f c) = (${height * width}, ${F}, ${c}) for one clip → q, k, v with ${heads} heads of d = ${d}. Pixel (${at.join(", ")}), head ${head()}.`),
      h("div", { class: "stages" },
        stage5("1", `q of frame ${i}`, `(${d},)`, bars(q), "What this frame asks for."),
        stage5("2", `k of frame ${j}`, `(${d},)`, bars(k), "What that frame offers."),
        stage5("3", "q · k", `(${d},) → ()`, bars(products), `The products sum to ${num(dot, 3)}.`),
        stage5("4", `÷ √${d}`, `(${F},)`, bars(scores, { mark: j, names: (n) => `frame ${n}` }), `${num(dot, 3)} ÷ ${num(root, 3)} = ${num(scores[j], 3)}.`),
        stage5("5", "softmax", `(${F},)`, bars(weights, { mark: j, signed: false, names: (n) => `frame ${n}`, digits: 4 }), `e^${num(scores[j], 3)} over the sum of the row: ${num(weights[j], 4)}.`)),
      h("p", { class: agrees ? "verdict ok" : "verdict" }, !recorded ? "The recorded weight is not here to compare with."
        : `${agrees ? "✓ Agrees with" : "✗ Differs from"} the recorded weight ${num(stored, 3)} (stored in steps of 1/255).`));
  }
  const nameRun = (s) => {
    const words = [];
    if (s.shuffle_frames) words.push("frames shuffled");
    if (s.drop_position) words.push("no position encoding");
    if (s.window !== undefined) words.push(s.window ? `window of ${s.window}` : "own frame only");
    if (s.temperature !== undefined) words.push(`temperature ${s.temperature}`);
    for (const [name, k] of s.zero_heads || []) words.push(`${layers.find((l) => l.name === name)?.label ?? name}, head ${k}, zeroed`);
    return words.join(", ") || "nothing changed";
  };
  function drawWhat() {
    const switches = get("switches"), wanted = `run/${canonical(switches)}`;
    flips.forEach((b) => b.setAttribute("aria-pressed", !!switches[b.dataset.switch]));
    windowSelect.value = switches.window ?? ""; heatSelect.value = switches.temperature ?? "";
    const zeroed = (switches.zero_heads || []).some((z) => same(z, [layer().name, head()]));
    zeroButton.textContent = `Zero ${layer().label}, head ${head()}`; zeroButton.setAttribute("aria-pressed", zeroed);
    const runs = [...new Set([...(get("runs") || []), wanted].filter((k) => data.get(k) && !data.get(k).error || (get("runs") || []).includes(k)))];
    stored.replaceChildren(...(runs.length ? [h("span", { class: "label" }, "Runs so far")] : []), ...runs.map((k) => h("button", { type: "button", class: "toggle", "aria-pressed": k === wanted,
      onclick: () => set({ switches: JSON.parse(k.slice(4)) }) }, nameRun(JSON.parse(k.slice(4))))));
    const answer = data.get(wanted) ?? ((get("runs") || []).includes(wanted) ? data.ask(wanted) : null);
    runButton.textContent = data.waiting(wanted) ? "Running …" : "Run again";
    runButton.disabled = !live || data.waiting(wanted);
    if (!answer) return result.replaceChildren(h("p", { class: "hint" }, data.waiting(wanted) ? "The model is running." : same(switches, {}) ? "Choose a switch." : `Not run yet: ${nameRun(switches)}.`));
    if (answer.error) return result.replaceChildren(h("p", { class: "verdict" }, answer.error));
    if (local.shown === answer && result.dataset.at === `${layerIndex()}/${head()}/${stepIndex()}/${query()}`) return;
    local.shown = answer; result.dataset.at = `${layerIndex()}/${head()}/${stepIndex()}/${query()}`;
    const size = F * H * W * 3, after = answer.bytes.subarray(0, size), maps = answer.bytes.subarray(size);
    const apart = Array.from({ length: F * H * W }, (_, n) => (Math.abs(after[3 * n] - film[3 * n]) + Math.abs(after[3 * n + 1] - film[3 * n + 1]) + Math.abs(after[3 * n + 2] - film[3 * n + 2])) / 3);
    const each = Array.from({ length: F }, (_, i) => sum(apart.slice(i * H * W, (i + 1) * H * W)) / H / W / 2.55), most = apart.reduce((a, b) => Math.max(a, b), 0) || 1;
    const row = (title, fill) => h("div", { class: "band" }, h("span", { class: "label" }, title), h("div", { class: "strip plain", style: `--frames:${F}` }, Array.from({ length: F }, (_, i) => { const c = h("canvas"); fill(c, i); return c; })));
    const before = meanMap(layerIndex(), head()), changed = maps.length ? meanMap(layerIndex(), head(), stepIndex(), maps) : null, top = Math.max(...before, ...(changed || [0]));
    const small = (title, values) => { const c = h("canvas"); paint(c, values, F, F, 0, top); return h("figure", { class: "small" }, c, h("figcaption", {}, title)); };
    result.replaceChildren(
      row("before", (c, i) => paintFrame(c, film, i, H, W)), row("after", (c, i) => paintFrame(c, after, i, H, W)),
      row("change", (c, i) => paint(c, apart.slice(i * H * W, (i + 1) * H * W), H, W, 0, most)),
      h("div", { class: "line numbers" }, h("div", {}, h("p", { class: "big" }, `${num(sum(each) / F, sum(each) / F < 1 ? 2 : 1)} %`), h("p", { class: "hint" }, `of full brightness: the mean change of a pixel with ${nameRun(switches)}. The brightest spot of the third strip changed by ${num(most / 2.55, 0)} %.`)),
        small("map before", before), ...(changed ? [small("map after", changed)] : []), h("p", { class: "hint" }, `${layer().label}, head ${head()}, mean over all pixels, at this step.`)));
    say(`With ${nameRun(switches)} a pixel changes by ${num(sum(each) / F, 2)} percent on average.`);
  }
  function drawKnown() {
    const cards = (get("presets") || []).map((p) => {
      const show = (title, values) => { if (!values) return null; const c = h("canvas"); paint(c, values.flat(), values.length, values[0].length, p.low ?? 0, p.high); return h("figure", { class: "small" }, c, h("figcaption", {}, title)); };
      return h("article", { class: "card", "data-preset": p.name }, h("div", { class: "title" }, p.title, h("b", { class: p.passed ? "pass" : "fail" }, p.passed ? "✓ pass" : "✗ fail")),
        h("p", {}, p.text), h("div", { class: "line" }, show("expected", p.expected), show(p.expected ? "measured" : "its own map", p.measured)), h("p", { class: "hint" }, p.verdict));
    });
    knownPanel.replaceChildren(h("div", { class: "cards" }, cards), h("div", { class: "line again" }, h("button", { type: "button", disabled: !live, onclick: () => { model.send({ ask: "presets" }); say("Checking."); } }, "Check again"),
      h("p", { class: "hint" }, live ? "Runs the three checks in the kernel." : "Checked when this page was written; checking again needs a kernel.")));
  }
  function draw() {
    const panel = get("panel"), s = stepIndex();
    layerSelect.value = layer().name; slider.value = s;
    slider.setAttribute("aria-valuetext", `step ${s + 1} of ${steps.length}, timestep ${steps[s].timestep}`);
    stepText.textContent = `${s + 1} of ${steps.length}, t = ${steps[s].timestep}`;
    playButton.replaceChildren(icon(local.timer ? ICONS.pause : ICONS.play));
    playButton.setAttribute("aria-label", local.timer ? "Pause" : "Play the steps"); playButton.setAttribute("aria-pressed", !!local.timer);
    measure.update(get("measure")); order.update(get("order"));
    overlay.setAttribute("aria-pressed", get("overlay"));
    if (get("pixel") || get("overlay")) chunk();
    drawStrip(drawMatrices()); drawStage(); drawChart();
    text.textContent = summary();
    names.forEach((p, n) => { panelOf[p].hidden = p !== panel; tabs[n].setAttribute("aria-selected", p === panel); tabs[n].tabIndex = p === panel ? 0 : -1; });
    if (panel === "heads") drawHeads();
    else if (panel === "follow") drawFollow();
    else if (panel === "what") drawWhat();
    else if (panel === "known" && !same(drawn.presets, get("presets"))) { drawn.presets = get("presets"); drawKnown(); }
    if (get("pixel") || get("overlay")) { const next = steps[(s + 1) % steps.length].step; if (!data.waiting(layerKey())) data.ask(layerKey(next)); }      // so that the next step is there
    root.dataset.drawn = `${layerIndex()}/${head()}/${get("step")}`;
    root.dataset.ready = !(get("pixel") || get("overlay")) || !data.waiting(layerKey());
  }
  STATE.concat("runs").forEach((name) => model.on(`change:${name}`, redraw));
  stage.addEventListener("blur", redraw); stage.addEventListener("focus", redraw);
  draw();
  return () => { clearInterval(local.timer); data.close(); STATE.concat("runs").forEach((name) => model.off(`change:${name}`, redraw)); };
}

// ---- the page without a kernel: the same model, out of what the page stores
async function inflate(base64) {
  const text = atob(base64), packed = new Uint8Array(text.length);
  for (let n = 0; n < text.length; n++) packed[n] = text.charCodeAt(n);
  return new Uint8Array(await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"))).arrayBuffer());
}
function storedModel(state, index, store) {
  const listeners = {}, fire = (name, ...args) => (listeners[name] || []).forEach((f) => f(...args));
  const slice = (key) => store.subarray(index[key].start, index[key].start + index[key].size);
  for (const name of ["film", "means"]) state[name] = slice(name);
  const why = (key) => (key.startsWith("follow/") ? `This page stores the queries and keys of pixel ${state.info.follow.map((p) => `(${p.join(", ")})`).join(" and ")} only: the rest needs a kernel.` : "This page does not store that: it needs a kernel.");
  return {
    get: (name) => state[name],
    set: (name, value) => { if (!same(state[name], value)) { state[name] = value; fire(`change:${name}`); } },
    save_changes: () => {},
    on: (name, f) => (listeners[name] ??= []).push(f),
    off: (name, f) => { listeners[name] = (listeners[name] || []).filter((g) => g !== f); },
    send: ({ ask: key }) => queueMicrotask(() => (index[key] ? fire("msg:custom", { ...index[key].info, key }, [slice(key)]) : fire("msg:custom", { key, error: why(key) }, []))),
  };
}
async function openPage() {
  const { state, index } = JSON.parse(document.getElementById("attention-state").textContent);
  const store = await inflate(document.getElementById("attention-store").textContent.trim());
  render({ model: storedModel(state, index, store), el: document.getElementById("attention-explorer") });
}

const CSS = `
.attention-explorer { --bg: var(--jp-layout-color1, #fdfcfa); --fg: var(--jp-ui-font-color1, #1c1f24); --accent: #1f6f8b; --ring: #1f6f8b; --good: #1f6f8b;
  --line: color-mix(in srgb, var(--fg) 16%, transparent); --soft: color-mix(in srgb, var(--fg) 5%, transparent); --muted: color-mix(in srgb, var(--fg) 68%, var(--bg));
  color-scheme: light; color: var(--fg); background: var(--bg); border: 1px solid var(--line); border-radius: 12px; padding: 18px 20px; margin: 4px; box-sizing: border-box;
  font: 14px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; font-variant-numeric: tabular-nums; container-type: inline-size; }
@media (prefers-color-scheme: dark) { .attention-explorer { --bg: var(--jp-layout-color1, #16181c); --fg: var(--jp-ui-font-color1, #e7e8ea); --accent: #5cb8cf; --ring: #8fd6e8; --good: #5cb8cf; color-scheme: dark; } }
[data-jp-theme-light="true"] .attention-explorer { --accent: #1f6f8b; --ring: #1f6f8b; --good: #1f6f8b; color-scheme: light; }
[data-jp-theme-light="false"] .attention-explorer, .vscode-dark .attention-explorer, html[theme="dark"] .attention-explorer { --bg: var(--jp-layout-color1, #16181c); --fg: var(--jp-ui-font-color1, #e7e8ea); --accent: #5cb8cf; --ring: #8fd6e8; --good: #5cb8cf; color-scheme: dark; }
.attention-explorer *, .attention-explorer *::before { box-sizing: border-box; }
.attention-explorer [hidden] { display: none !important; }
.attention-explorer p { margin: 4px 0; } .attention-explorer figure { margin: 0; }
.attention-explorer canvas { image-rendering: pixelated; display: block; width: 100%; }
.attention-explorer header { display: flex; justify-content: space-between; align-items: end; gap: 16px; flex-wrap: wrap; margin-bottom: 14px; }
.attention-explorer .name { font-size: 20px; font-weight: 600; line-height: 1.25; }
.attention-explorer .label, .attention-explorer .hint { color: var(--muted); font-size: 12.5px; }
.attention-explorer .title { font-size: 13px; font-weight: 600; margin-bottom: 6px; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.attention-explorer .value { min-width: 2.5ch; text-align: center; font-size: 13px; white-space: nowrap; }
.attention-explorer .field { display: flex; flex-direction: column; gap: 4px; }
.attention-explorer .line { display: flex; align-items: center; gap: 8px; flex-wrap: wrap; }
.attention-explorer .tools { display: flex; flex-wrap: wrap; gap: 14px 28px; padding-bottom: 14px; border-bottom: 1px solid var(--line); }
.attention-explorer button, .attention-explorer select { font: inherit; font-size: 13px; color: inherit; background: var(--bg); border: 1px solid var(--line); border-radius: 7px; padding: 4px 10px; min-height: 30px; cursor: pointer; margin: 0; }
.attention-explorer option { background: var(--bg); color: var(--fg); }
.attention-explorer button:hover:not(:disabled), .attention-explorer select:hover:not(:disabled) { background: var(--soft); }
.attention-explorer button:disabled, .attention-explorer select:disabled { color: var(--muted); cursor: not-allowed; opacity: 0.65; }
.attention-explorer :focus-visible { outline: 2.5px solid var(--ring); outline-offset: 2px; }
.attention-explorer button[aria-pressed="true"], .attention-explorer .seg [aria-checked="true"] { background: color-mix(in srgb, var(--accent) 16%, var(--bg)); border-color: var(--accent); font-weight: 600; }
.attention-explorer button.icon { padding: 0; width: 30px; display: inline-grid; place-items: center; }
.attention-explorer button.go { background: var(--accent); border-color: var(--accent); color: var(--bg); font-weight: 600; }
.attention-explorer button.go:hover:not(:disabled) { background: color-mix(in srgb, var(--accent) 85%, var(--fg)); }
.attention-explorer .seg { display: inline-flex; } .attention-explorer .seg button { border-radius: 0; margin-left: -1px; position: relative; }
.attention-explorer .seg [aria-checked="true"] { z-index: 1; }
.attention-explorer .seg button:first-child { border-radius: 7px 0 0 7px; margin-left: 0; } .attention-explorer .seg button:last-child { border-radius: 0 7px 7px 0; }
.attention-explorer input[type="range"] { width: 170px; accent-color: var(--accent); margin: 0; }
.attention-explorer .film { padding: 12px 0 14px; }
.attention-explorer .strip { display: grid; grid-template-columns: repeat(var(--frames), minmax(0, 1fr)); gap: 4px; margin-top: 6px; }
.attention-explorer .frame { padding: 0 0 2px; border: 0; background: none; min-height: 0; display: grid; gap: 3px; border-radius: 6px; text-align: center; font-size: 11.5px; }
.attention-explorer .frame:hover:not(:disabled) { background: none; }
.attention-explorer .frame canvas { border-radius: 5px; box-shadow: 0 0 0 1px var(--line); aspect-ratio: 1; object-fit: cover; }
.attention-explorer .frame .bar { height: 30px; display: flex; align-items: end; justify-content: center; border-bottom: 1px solid var(--line); }
.attention-explorer .frame .bar i { display: block; width: 62%; background: var(--accent); border-radius: 2px 2px 0 0; }
.attention-explorer .frame b { font-weight: 400; } .attention-explorer .frame .n { color: var(--muted); font-size: 11px; }
.attention-explorer .frame.asks { outline: 2px solid var(--fg); outline-offset: 2px; } .attention-explorer .frame.asks .n { color: var(--fg); font-weight: 700; }
.attention-explorer .locked .frame.asks { outline-width: 3px; } .attention-explorer .frame:focus-visible { outline: 3px solid var(--ring); }
.attention-explorer .main { display: grid; grid-template-columns: 232px auto minmax(280px, 1fr); gap: 18px 26px; align-items: start; }
.attention-explorer .stage { position: relative; width: 232px; border-radius: 6px; overflow: hidden; cursor: crosshair; border: 1px solid var(--line); }
.attention-explorer .stage > * { position: absolute; inset: 0; height: 100%; }
.attention-explorer .heat { opacity: 0.72; }
.attention-explorer .marks { background-image: linear-gradient(to right, rgb(128 128 128 / 0.28) 1px, transparent 1px), linear-gradient(to bottom, rgb(128 128 128 / 0.28) 1px, transparent 1px); background-size: calc(100% / var(--cells)) calc(100% / var(--cells)); }
.attention-explorer .pixel, .attention-explorer .cursor { position: absolute; border: 2.5px solid #fff; box-shadow: 0 0 0 1.5px #000, inset 0 0 0 1.5px #000; }
.attention-explorer .pixel.b { border-style: dashed; } .attention-explorer .cursor { border: 1.5px dotted #fff; }
.attention-explorer .pixel span { position: absolute; top: 1px; left: 1px; background: #000; color: #fff; font: 700 11px/14px system-ui, sans-serif; padding: 0 3px; border-radius: 0 0 3px 0; }
.attention-explorer .scale { display: flex; align-items: center; gap: 8px; font-size: 12px; color: var(--muted); margin: 6px 0 2px; white-space: nowrap; }
.attention-explorer .ramp { flex: 1; height: 8px; max-width: 150px; border-radius: 4px; background: linear-gradient(to right, #440154, #3b528b, #21918c, #5ec962, #fde725); }
.attention-explorer .pair { display: grid; gap: 14px; grid-template-columns: minmax(0, 1fr); width: 330px; } .attention-explorer .pair.two { grid-template-columns: repeat(2, minmax(0, 1fr)); width: 530px; } .attention-explorer .scale.indent { padding-left: 18px; }
.attention-explorer .axes { display: grid; grid-template-columns: 18px 1fr; }
.attention-explorer .axes .y { writing-mode: vertical-rl; transform: rotate(180deg); text-align: center; font-size: 11.5px; color: var(--muted); }
.attention-explorer .axes .x { grid-column: 2; display: flex; justify-content: space-between; font-size: 11.5px; color: var(--muted); padding-top: 2px; }
.attention-explorer .plot { position: relative; cursor: crosshair; border-radius: 3px; }
.attention-explorer .plot .row, .attention-explorer .plot .cell { position: absolute; pointer-events: none; }
.attention-explorer .plot .row { left: 0; right: 0; border: 2px solid #fff; box-shadow: 0 0 0 1.5px #000, inset 0 0 0 1px #000; border-radius: 2px; }
.attention-explorer .plot .cell { border: 2px solid #fff; box-shadow: 0 0 0 1.5px #000; }
.attention-explorer .headrow { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 6px; max-width: 420px; }
.attention-explorer .thumb { padding: 5px 5px 2px; display: grid; grid-auto-flow: row; gap: 3px; justify-items: center; } .attention-explorer .thumb canvas { border-radius: 2px; }
.attention-explorer .thumb span { font-size: 12px; } .attention-explorer .thumb[aria-checked="true"] { border-color: var(--accent); background: color-mix(in srgb, var(--accent) 16%, var(--bg)); font-weight: 700; }
.attention-explorer .summary { background: var(--soft); border-radius: 8px; padding: 9px 13px; margin: 14px 0 16px; min-height: 3.9em; }
.attention-explorer .tabs { display: flex; gap: 4px; border-bottom: 1px solid var(--line); flex-wrap: wrap; }
.attention-explorer .tabs button { border: 0; border-radius: 7px 7px 0 0; padding: 6px 12px; border-bottom: 2.5px solid transparent; background: none; color: var(--muted); }
.attention-explorer .tabs button[aria-selected="true"] { border-bottom-color: var(--accent); color: var(--fg); font-weight: 600; }
.attention-explorer .panels { padding-top: 14px; min-height: 260px; }
.attention-explorer .tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(66px, 1fr)); gap: 5px; margin-top: 10px; }
@container (min-width: 1000px) { .attention-explorer .tiles.square { grid-template-columns: repeat(var(--layers), minmax(0, 1fr)); } }
.attention-explorer .tile { padding: 4px; display: block; text-align: left; font-size: 10.5px; line-height: 1.3; border-color: transparent; } .attention-explorer .tile canvas { border-radius: 2px; margin-bottom: 3px; }
.attention-explorer .tile b { font-size: 12.5px; font-weight: 600; } .attention-explorer .tile span { color: var(--muted); font-weight: 400; display: block; white-space: nowrap; overflow: hidden; }
.attention-explorer .chart { margin-top: 16px; max-width: 420px; } .attention-explorer .chart svg { width: 100%; } .attention-explorer text { fill: var(--muted); font-size: 10.5px; }
.attention-explorer polyline { fill: none; stroke: var(--muted); stroke-width: 1; opacity: 0.6; } .attention-explorer polyline.mine { stroke: var(--accent); stroke-width: 2.6; opacity: 1; }
.attention-explorer circle { fill: var(--accent); } .attention-explorer line.base { stroke: var(--line); } .attention-explorer line.now { stroke: var(--fg); stroke-dasharray: 3 3; }
.attention-explorer .stages { display: grid; grid-template-columns: repeat(5, minmax(0, 1fr)); gap: 12px; margin: 10px 0; }
.attention-explorer .stage5 { background: var(--soft); border-radius: 8px; padding: 10px 12px; } .attention-explorer .stage5 .title { display: flex; gap: 8px; align-items: center; margin-bottom: 0; }
.attention-explorer .stage5 .title b { border: 1px solid var(--line); border-radius: 50%; width: 20px; height: 20px; display: inline-grid; place-items: center; font-size: 11px; }
.attention-explorer .stage5 p { font-size: 12.5px; } .attention-explorer code { font: 12px ui-monospace, "DejaVu Sans Mono", monospace; color: var(--muted); background: none; }
.attention-explorer .bars { width: 100%; height: 70px; display: block; margin: 8px 0; } .attention-explorer .bars rect { fill: var(--accent); } .attention-explorer .bars .rest { fill: color-mix(in srgb, var(--fg) 32%, var(--bg)); } .attention-explorer .bars line { vector-effect: non-scaling-stroke; }
.attention-explorer .verdict { font-weight: 600; } .attention-explorer .verdict.ok, .attention-explorer .pass { color: var(--good); }
.attention-explorer .switches { align-items: end; gap: 10px 12px; } .attention-explorer .stored { margin: 8px 0; }
.attention-explorer .band { display: grid; grid-template-columns: 52px 1fr; align-items: center; margin-bottom: 4px; } .attention-explorer .strip.plain { margin: 0; } .attention-explorer .strip.plain canvas { border-radius: 3px; }
.attention-explorer .numbers { gap: 26px; align-items: start; margin-top: 12px; } .attention-explorer .numbers > div { max-width: 300px; } .attention-explorer .big { font-size: 26px; font-weight: 600; line-height: 1.1; }
.attention-explorer .small canvas { width: 116px; border-radius: 3px; } .attention-explorer .small figcaption { font-size: 12px; color: var(--muted); margin-top: 3px; }
.attention-explorer .cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(250px, 1fr)); gap: 14px; margin-bottom: 12px; } .attention-explorer .card .small { flex: 0 1 112px; } .attention-explorer .card .small canvas { width: 100%; } .attention-explorer .card { background: var(--soft); border-radius: 8px; padding: 12px 14px; }
.attention-explorer .card .title { display: flex; justify-content: space-between; margin-bottom: 2px; } .attention-explorer .card p { margin: 2px 0 8px; } .attention-explorer .fail { text-decoration: underline; }
.attention-explorer .help { max-width: 74ch; } .attention-explorer .help p { margin: 0 0 9px; }
.attention-explorer .sr { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
@container (max-width: 1040px) { .attention-explorer .main { grid-template-columns: 200px minmax(0, 1fr) 232px; } .attention-explorer .stage { width: 200px; } .attention-explorer .pair, .attention-explorer .pair.two { width: 100%; max-width: 530px; } .attention-explorer .pair:not(.two) { max-width: 330px; } }
@container (max-width: 900px) { .attention-explorer .stages { grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); } }
@container (max-width: 760px) { .attention-explorer .main { grid-template-columns: 1fr; } .attention-explorer .strip:not(.plain) { grid-template-columns: repeat(8, minmax(0, 1fr)); row-gap: 12px; } }
`;

export default { render, openPage };
