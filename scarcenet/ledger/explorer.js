// Pseudo-label explorer: why did each keypoint of each animal get its decision?
// Index letters: e epoch (E), i sample animal (n), k keypoint (K), v visit in an epoch (V). Positions: px of the crop.

const TRUTH = 3, RELIABLE = 2, REUSABLE = 1, CONSISTENCY = 0, IGNORED = -1;
const KINDS = [TRUTH, RELIABLE, REUSABLE, CONSISTENCY, IGNORED];
const RUN_RULES = { keep: null, agree_px: null, drop: null };
const PAGE = 24;
const TYPES = { float32: Float32Array, int8: Int8Array, int16: Int16Array, int32: Int32Array, uint8: Uint8Array };

// ---- data ------------------------------------------------------------------------------------------------------

/** base64 text -> ArrayBuffer */
function bytes(text) {
  const raw = atob(text), out = new Uint8Array(raw.length);
  for (let b = 0; b < raw.length; b++) out[b] = raw.charCodeAt(b);
  return out.buffer;
}

/** {dtype, shape, data: base64} -> flat typed array */
export const decode = ({ dtype, data }) => new TYPES[dtype](bytes(data));

const decodeEach = (arrays) => Object.fromEntries(Object.entries(arrays).map(([name, a]) => [name, decode(a)]));

/** bundle.all -> the same with flat typed arrays */
export const decodeAll = ({ epochs, ...rest }) => ({ ...decodeEach(rest), epochs: epochs.map(decodeEach) });

/** Round to the nearest integer, halves to even (as Python's round). */
function roundEven(x) {
  const up = Math.round(x);
  return up - x === 0.5 && up % 2 !== 0 ? up - 1 : up;
}

/** Smallest score (N,K) among unlabelled keypoints that is still used when the share `drop` is dropped. */
function scoreCut(score, labelled, drop) {
  const K = score.length / labelled.length;
  const sorted = score.filter((_, j) => !labelled[Math.floor(j / K)]).sort();
  return sorted[Math.min(Math.floor(sorted.length * drop), sorted.length - 1)];
}

/** Visits x keypoints (V*K) u8: 1 where the loss is among the smallest of its batch. has: (N,K) u8. */
function smallLosses({ index, batch, loss }, has, keep) {
  const K = loss.length / index.length, competing = new Map(), reliable = new Uint8Array(loss.length);
  for (let p = 0; p < loss.length; p++) {
    const v = Math.floor(p / K);
    if (!has[index[v] * K + p % K] || Number.isNaN(loss[p])) continue;
    if (!competing.has(batch[v])) competing.set(batch[v], []);
    competing.get(batch[v]).push(p);
  }
  const share = BigInt(roundEven(keep * 1e9));
  for (const places of competing.values()) {
    const quota = Number(BigInt(places.length) * share / 1000000000n);
    places.sort((p, q) => loss[p] - loss[q]); // stable: ties keep row-major order
    for (const p of places.slice(0, quota)) reliable[p] = 1;
  }
  return reliable;
}

/** Decide one epoch again. all: of decodeAll; run: bundle.run_rules. Returns the last visits' {decision: Int8Array (N,K), counts}. */
export function redecide(all, run, rules, e) {
  const { score, has_label, labelled } = all, { index, distance } = all.epochs[e];
  const K = score.length / labelled.length;
  const cut = rules.drop === null ? null : scoreCut(score, labelled, rules.drop);
  const has = has_label.map((h, j) => (cut === null || labelled[Math.floor(j / K)] ? h : score[j] >= cut));
  const reliable = smallLosses(all.epochs[e], has, rules.keep ?? run.keep[e]);
  const agree = Math.fround(rules.agree_px ?? run.agree_px);
  const last = new Map();
  index.forEach((i, v) => last.set(i, v));
  const decision = new Int8Array(score.length).fill(IGNORED); // animals without a visit stay so and are not counted
  const counts = Object.fromEntries(KINDS.map((kind) => [kind, 0]));
  for (const [i, v] of last) {
    for (let k = 0; k < K; k++) {
      const j = i * K + k, p = v * K + k;
      const rest = has[j] || !(labelled[i] || run.confident_only) ? CONSISTENCY : IGNORED;
      if (labelled[i]) decision[j] = has[j] ? TRUTH : rest;
      else decision[j] = reliable[p] ? RELIABLE : distance[p] < agree ? REUSABLE : rest;
      if (!labelled[i]) counts[decision[j]]++;
    }
  }
  return { decision, counts };
}

/** anywidget's model over a plain object; `decisions` are computed here from bundle.all. */
export function localModel(state) {
  const listeners = {}, all = decodeAll(state.bundle.all), run = state.bundle.run_rules;
  const runCounts = state.bundle.epochs.map(() => null);
  const decide = () => {
    const e = state.epoch, { decision, counts } = redecide(all, run, state.rules, e);
    runCounts[e] = runCounts[e] || redecide(all, run, RUN_RULES, e).counts;
    const K = state.bundle.names.length, data = new Int8Array(all.rows.length * K);
    all.rows.forEach((row, i) => data.set(decision.subarray(row * K, row * K + K), i * K));
    state.decisions = { epoch: e, data: data.buffer, counts, run_counts: runCounts[e] };
  };
  state = { epoch: 0, rules: RUN_RULES, selected: { instance: 0, keypoint: 0 }, ...state };
  decide();
  const emit = (name) => [...(listeners["change:" + name] || [])].forEach((f) => f());
  return {
    get: (name) => state[name],
    set(name, value) {
      if (state[name] === value) return;
      state[name] = value;
      const redo = name === "epoch" || name === "rules";
      if (redo) decide();
      emit(name);
      if (redo) emit("decisions");
    },
    save_changes() {},
    on: (event, f) => (listeners[event] = listeners[event] || []).push(f),
    off: (event, f) => (listeners[event] = (listeners[event] || []).filter((g) => g !== f)),
  };
}

// ---- facts -----------------------------------------------------------------------------------------------------

/** Decisions Int8Array (n,K) to show: the model's, or the run's own until those of this epoch have come. */
function shownDecisions(model, a, size) {
  const { epoch, data } = model.get("decisions") || {}, e = model.get("epoch");
  if (epoch !== e) return a.decision.subarray(e * size, (e + 1) * size);
  if (typeof data === "string") return new Int8Array(bytes(data));
  return data instanceof ArrayBuffer ? new Int8Array(data) : new Int8Array(data.buffer, data.byteOffset, data.byteLength);
}

const point = (xy, j) => [xy[2 * j], xy[2 * j + 1]];
const known = ([x, y]) => Number.isFinite(x) && Number.isFinite(y);

/** What is known of one keypoint under decision d. j: place in (n,K); ej: place in (E,n,K). */
function factsOf(a, j, ej, d) {
  const label = point(a.label_xy, j), ran = a.decision[ej];
  const labelRight = a.label_right ? a.label_right[j] : -1;
  const right = d === ran && a.right ? a.right[ej] : d === REUSABLE ? -1 : labelRight; // another target than the run's: judged only if it is the label
  return {
    d, ran, label, labelRight, right, target: d === REUSABLE ? point(a.student_xy, ej) : label,
    weak: point(a.weak_xy, ej), student: point(a.student_xy, ej), teacher: point(a.teacher_xy, ej),
    truth: a.truth_xy && a.truth_known[j] ? point(a.truth_xy, j) : [NaN, NaN],
    score: a.score[j], has: a.has_label[j] > 0, loss: a.loss[ej], rank: a.rank[ej], quota: a.quota[ej], distance: a.distance[ej],
  };
}

const apart = ([x1, y1], [x2, y2]) => Math.hypot(x1 - x2, y1 - y2);
const judged = (right) => ["unknown", "wrong", "right"][right + 1];
const spaced = (count) => count.toLocaleString("en-US");

/** One plain sentence: why keypoint facts f got its decision. */
function verdict(f, labelled, rules, agree, kinds) {
  const loss = !f.has && rules.drop === null ? "its confidence is below the cut"
    : rules.keep !== null || rules.drop !== null ? "its loss is not among the smallest of its batch"
    : f.rank < 0 ? "it has no loss to compare" : `its loss is too large (rank ${f.rank + 1}, quota ${f.quota})`;
  const answers = Number.isFinite(f.distance) ? `its two answers differ by ${f.distance.toFixed(2)} heatmap px` : "its two answers cannot be compared";
  const unused = labelled ? "nobody labelled this keypoint" : `${loss} and ${answers}`;
  const why = {
    [TRUTH]: "A person placed this label, so it is used as it is",
    [RELIABLE]: "The pseudo-label is used, because its loss is among the smallest of its batch",
    [REUSABLE]: `The network's own answer replaces the pseudo-label: ${loss}, but two answers agree within ${agree} heatmap px`,
    [CONSISTENCY]: `No label is used, only consistency between views: ${unused}`,
    [IGNORED]: `Left out of the training step: ${unused}`,
  }[f.d];
  const truth = f.d < REUSABLE ? "" : { 0: "; the target is wrong", 1: "; the target is right" }[f.right] || "";
  return why + truth + (f.d === f.ran ? "." : ` (the run itself decided: ${kinds[f.ran]}).`);
}

// ---- drawing ---------------------------------------------------------------------------------------------------

const SVG = new Set(["svg", "g", "line", "circle", "path", "image"]);

/** New HTML or SVG element; attributes beginning with "on" are listeners. */
function h(tag, attrs = {}, ...children) {
  const node = SVG.has(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attrs)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

/** Marker shapes in a box from -1 to 1. */
const SHAPES = {
  label: ["label", "M-.8-.8L.8 .8M.8-.8L-.8 .8"],
  weak: ["weak view", "M-.9-.7L.9-.7L0 .9Z"],
  student: ["network, plain view", "M-.9 .7L.9 .7L0-.9Z"],
  teacher: ["teacher", "M0-1L.8 0L0 1L-.8 0Z"],
  truth: ["truth (held back)", "M0-1L.25-.32L.95-.31L.4 .12L.59 .81L0 .4L-.59 .81L-.4 .12L-.95-.31L-.25-.32Z"],
};

/** A marker at [x, y] with half-width r. */
const marker = (name, [x, y], r) => h("g", { class: "mark", transform: `translate(${x} ${y}) scale(${r})` },
  h("path", { d: SHAPES[name][1], class: "halo" }), h("path", { d: SHAPES[name][1], class: name }));

const lineTo = ([x1, y1], [x2, y2], cls) => h("line", { x1, y1, x2, y2, class: cls });

const shownMarks = (f) => Object.keys(SHAPES).filter((name) => known(f[name]));

/** Markers of a keypoint's facts f, half-width r, each joined to the label. */
function marksOf(f, r) {
  const names = shownMarks(f);
  return [...(known(f.label) ? names.map((name) => lineTo(f.label, f[name], "link")) : []), ...names.map((name) => marker(name, f[name], r))];
}

/** Stacked bar of counts {kind: number}, named in words by its title. */
function paintBar(bar, counts, { kinds, colours }) {
  const present = KINDS.filter((kind) => counts[kind]), total = present.reduce((sum, kind) => sum + counts[kind], 0);
  bar.replaceChildren(...present.map((kind) => h("span", { style: `flex-grow:${counts[kind] / total};background:${colours[kind]}` })));
  bar.title = present.map((kind) => `${kinds[kind]} ${spaced(counts[kind])} (${(100 * counts[kind] / total).toFixed(0)}%)`).join(", ");
  bar.setAttribute("aria-label", bar.title);
}

// ---- the explorer ----------------------------------------------------------------------------------------------

function render({ model, el }) {
  const bundle = model.get("bundle"), a = decodeEach(bundle.arrays);
  const { names, bones, sides, kinds, colours, instances, run_rules: run } = bundle;
  const n = instances.length, K = names.length, E = bundle.epochs.length, hasTruth = Boolean(a.right || a.label_right);
  const swatch = (kind) => h("i", { class: "swatch", style: `background:${colours[kind]}` });
  let decisions, matches = [], page = 0;

  const put = (name, value) => { model.set(name, value); model.save_changes(); };
  const facts = (i, k) => factsOf(a, i * K + k, (model.get("epoch") * n + i) * K + k, decisions[i * K + k]);
  const setRule = (name, value) => put("rules", { ...model.get("rules"), [name]: value });
  const setEpoch = (e) => put("epoch", Math.max(0, Math.min(E - 1, e)));

  // --- filters
  const select = (test, label, pairs) => h("select", { "data-test": test, "aria-label": label, onchange: refilter },
    ...[["", `any ${label}`], ...pairs].map(([value, text]) => h("option", { value }, text)));
  const check = (test) => h("input", { type: "checkbox", "data-test": test, onchange: refilter }), tick = (box, text) => h("label", {}, box, text);
  const category = select("category", "category", [...new Set(instances.map((x) => x.category))].sort().map((c) => [c, c]));
  const joint = select("keypoint", "keypoint", names.map((name, k) => [k, name]));
  const kind = select("kind", "decision", KINDS.map((d) => [d, kinds[d]]));
  const wrong = check("wrong"), unlabelled = check("unlabelled");

  /** Does keypoint k of animal i pass the filters on keypoints? */
  const passes = (i, k) => (joint.value === "" || k === Number(joint.value))
    && (kind.value === "" || decisions[i * K + k] === Number(kind.value))
    && (!wrong.checked || facts(i, k).right === 0);
  const firstPassing = (i) => names.findIndex((_, k) => passes(i, k));
  const findMatches = () => instances.map((_, i) => i).filter((i) => (category.value === "" || instances[i].category === category.value)
    && !(unlabelled.checked && instances[i].labelled) && firstPassing(i) >= 0);

  const pick = (instance, keypoint) => put("selected", { instance, keypoint });
  /** Go to animal i, one of the matches: at the same keypoint if it passes the filters, else at the first which does. */
  function choose(i) {
    const { keypoint } = model.get("selected");
    pick(i, passes(i, keypoint) ? keypoint : firstPassing(i));
  }
  function step(by) {
    const now = model.get("selected").instance;
    const to = by > 0 ? matches.find((i) => i > now) : matches.filter((i) => i < now).pop();
    if (to !== undefined) choose(to);
  }
  function refilter() {
    matches = findMatches();
    const { instance } = model.get("selected");
    if (matches.length) choose(matches.includes(instance) ? instance : matches[0]);
    followSelection();
  }

  // --- left column: grid of thumbnails
  const found = h("p", { "data-test": "matches", role: "status" });
  const thumbs = Array.from({ length: PAGE }, (_, slot) => h("button", { class: "thumb", onclick: () => choose(matches[page * PAGE + slot]) },
    h("img", { alt: "" }), h("span", { class: "bar" })));
  const turn = (by) => { page += by; update(); };
  const prev = h("button", { "data-test": "prev", "aria-label": "previous page", onclick: () => turn(-1) }, "‹ prev");
  const next = h("button", { "data-test": "next", "aria-label": "next page", onclick: () => turn(1) }, "next ›");
  const pages = h("span");

  function paintThumbs() {
    const last = Math.max(0, Math.ceil(matches.length / PAGE) - 1), { instance } = model.get("selected");
    page = Math.min(page, last);
    found.textContent = `${matches.length} of ${n} animals`;
    pages.textContent = `${page + 1} / ${last + 1}`;
    prev.disabled = page === 0;
    next.disabled = page === last;
    thumbs.forEach((thumb, slot) => {
      const i = matches[page * PAGE + slot], [img, bar] = thumb.children;
      thumb.hidden = i === undefined;
      if (thumb.hidden) return;
      if (img.getAttribute("src") !== instances[i].picture) img.src = instances[i].picture;
      const counts = {};
      for (const d of decisions.subarray(i * K, i * K + K)) counts[d] = (counts[d] || 0) + 1;
      paintBar(bar, counts, bundle);
      thumb.title = `${instances[i].category}, ${instances[i].file}: ${bar.title}`;
      thumb.setAttribute("aria-label", thumb.title);
      thumb.setAttribute("aria-pressed", i === instance);
    });
  }

  // --- middle: picture
  const caption = h("p", { class: "caption" });
  const image = h("image"), overlay = h("g");
  const picture = h("svg", { class: "picture", role: "img", "aria-label": "animal with keypoints" }, image, overlay);
  const closeup = h("svg", { class: "picture closeup", role: "img", "aria-label": "close-up of the selected keypoint" }, h("image"), h("g", { class: "disc" }));
  const glyph = (name) => h("svg", { viewBox: "-1.4 -1.4 2.8 2.8", "aria-hidden": "true" }, marker(name, [0, 0], 1));
  const legend = h("p", { class: "legend" },
    ...Object.keys(SHAPES).filter((name) => name !== "truth" || a.truth_xy).map((name) => h("span", {}, glyph(name), SHAPES[name][0])),
    hasTruth ? h("span", {}, h("i", { class: "ring" }), "wrong target") : "", h("span", {}, h("i", { class: "dashes" }), "right side"));

  function paintPicture({ instance: i, keypoint }) {
    const { width, height, picture: href, category: what, family, file, labelled } = instances[i];
    const unit = Math.max(width, height) / 100, margin = 3 * unit;
    if (image.getAttribute("href") !== href) {
      picture.setAttribute("viewBox", [-margin - 0.5, -margin - 0.5, width + 2 * margin, height + 2 * margin].join(" "));
      for (const copy of [image, closeup.firstChild]) {       // a position is whole in the middle of a pixel
        for (const [name, value] of Object.entries({ href, width, height, x: -0.5, y: -0.5 })) copy.setAttribute(name, value);
      }
    }
    caption.replaceChildren(h("b", {}, what), ` (${family}) · ${file} · ${labelled ? "labelled by a person" : "unlabelled"}`);
    const all = names.map((_, k) => facts(i, k)), f = all[keypoint];
    const parts = bones.filter(([p, q]) => known(all[p].target) && known(all[q].target))
      .map(([p, q]) => lineTo(all[p].target, all[q].target, sides[p] === "right" || sides[q] === "right" ? "bone right" : "bone"));
    all.forEach(({ d, right, target: [cx, cy] }, k) => {
      if (!known([cx, cy])) return;
      const r = (k === keypoint ? 2.4 : 1.6) * unit;
      const disc = h("g", { class: "disc", "data-test": `disc-${k}`, onclick: () => pick(i, k) },
        h("circle", { cx, cy, r, fill: colours[d] }), right === 0 ? h("circle", { cx, cy, r: r + 0.9 * unit, class: "wrong" }) : "");
      disc.append(document.createElementNS(disc.namespaceURI, "title"));
      disc.lastChild.textContent = `${names[k]}: ${kinds[d]}${right === 0 ? ", target wrong" : ""}`;
      parts.push(disc);
    });
    overlay.replaceChildren(...parts, ...marksOf(f, 1.3 * unit));
    paintCloseup(f, 2 * unit);
  }
  /** The selected keypoint's facts f, enlarged so that all its markers are seen; at least 2 * least px of the crop wide. */
  function paintCloseup(f, least) {
    closeup.style.visibility = known(f.target) ? "visible" : "hidden";
    if (!known(f.target)) return;
    const [cx, cy] = f.target, half = 1.3 * Math.max(least, ...shownMarks(f).map((name) => apart(f[name], f.target)));
    closeup.setAttribute("viewBox", [cx - half, cy - half, 2 * half, 2 * half].join(" "));
    closeup.lastChild.replaceChildren(h("circle", { cx, cy, r: 0.14 * half, fill: colours[f.d] }), ...marksOf(f, 0.08 * half));
  }

  // --- right column: panel, history, list of keypoints
  const heading = h("h3"), sentence = h("p", { class: "verdict", "data-test": "verdict", role: "status" }), table = h("table");
  const history = bundle.epochs.map((epoch, e) => h("button", { class: "square", onclick: () => setEpoch(e) }));
  const list = names.map((name, k) => h("button", { "data-test": `keypoint-${k}`, onclick: () => pick(model.get("selected").instance, k) }));

  function paintPanel({ instance: i, keypoint: k }, rules, e) {
    const f = facts(i, k), { labelled } = instances[i], agree = rules.agree_px ?? run.agree_px;
    const rows = [
      ["confidence", f.score.toFixed(3) + (labelled ? "" : f.has ? ", above the run's cut" : ", below the run's cut")],
      ["loss", Number.isNaN(f.loss) ? "none" : f.loss.toPrecision(3)],
      ["place in its batch", f.rank < 0 ? "did not compete" : `rank ${f.rank + 1}, quota ${f.quota} (run)`],
      ["answers apart", Number.isNaN(f.distance) ? "none" : `${f.distance.toFixed(2)} heatmap px, ${f.distance < Math.fround(agree) ? "under" : "not under"} ${agree}`],
      ["target moved", f.d < REUSABLE ? "no label used" : `${apart(f.target, f.label).toFixed(2)} crop px`],
    ];
    if (hasTruth) rows.push(["label", judged(f.labelRight)], ["target", judged(f.right) + (f.d < REUSABLE ? ", not used" : "")]);
    heading.replaceChildren(names[k], h("span", { class: "chip" }, swatch(f.d), kinds[f.d]));
    sentence.textContent = verdict(f, labelled, rules, agree, kinds);
    table.replaceChildren(...rows.map(([what, value]) => h("tr", {}, h("th", { scope: "row" }, what), h("td", {}, value))));
    history.forEach((square, at) => {
      const d = a.decision[(at * n + i) * K + k];
      square.style.background = colours[d];
      square.title = `epoch ${bundle.epochs[at]}: ${kinds[d]}`;
      square.setAttribute("aria-label", square.title);
      square.setAttribute("aria-current", at === e);
    });
    list.forEach((row, at) => {
      const { d, right } = facts(i, at);
      row.replaceChildren(swatch(d), names[at], h("small", {}, kinds[d] + (right === 0 ? " ✗ wrong" : "")));
      row.setAttribute("aria-pressed", at === k);
    });
  }

  // --- top: sliders and counts
  const slider = (test, label, attrs, oninput, reset) => {
    const output = h("output"), input = h("input", { type: "range", "data-test": test, "aria-label": label, ...attrs, oninput });
    return { input, output, reset, box: h("div", { class: "slider" }, h("span", {}, label, output), input, reset || "") };
  };
  const rule = (name, label, max, size) => slider(name, label, { min: 0, max, step: size }, (event) => setRule(name, Number(event.target.value)),
    h("button", { "data-test": `${name}-reset`, "aria-label": `${label}: run's own`, onclick: () => setRule(name, null) }, "run's own"));
  const epochs = slider("epoch", "epoch", { min: 0, max: E - 1, step: 1 }, (event) => setEpoch(Number(event.target.value)));
  const sliders = { keep: rule("keep", "keep small losses", 1, 0.01), agree_px: rule("agree_px", "agree within, px", 3, 0.05),
    drop: rule("drop", "drop least confident", 0.99, 0.01) };
  const note = h("p", { class: "note", "data-test": "note", role: "status" });
  const bars = { run: h("div", { class: "bar", role: "img" }), now: h("div", { class: "bar", role: "img" }) }, numbers = h("p", { class: "legend" });

  function paintTop(rules, e) {
    epochs.input.value = e;
    epochs.output.textContent = bundle.epochs[e];
    for (const [name, { input, output, reset }] of Object.entries(sliders)) {
      const own = name === "keep" ? run.keep[e] : run[name], value = rules[name] ?? own;
      input.value = value;
      output.textContent = Number(value.toFixed(3)) + (rules[name] === null ? " (run)" : "");
      reset.disabled = rules[name] === null;
    }
    const changed = Object.keys(sliders).some((name) => rules[name] !== null);
    note.textContent = changed ? "What if: one step with the network as it was, not a retraining" : "";
    note.style.visibility = changed ? "visible" : "hidden";
    const { counts = {}, run_counts: own } = model.get("decisions") || {};
    bars.run.parentElement.hidden = !own;
    if (own) paintBar(bars.run, own, bundle);
    paintBar(bars.now, counts, bundle);
    numbers.replaceChildren(...KINDS.filter((d) => d !== TRUTH).map((d) => h("span", {}, swatch(d), `${kinds[d]} `,
      h("b", {}, (own && changed ? `${spaced(own[d] || 0)} → ` : "") + spaced(counts[d] || 0)))));
  }

  // --- put together
  function update() {
    const rules = model.get("rules"), selected = model.get("selected"), e = model.get("epoch");
    decisions = shownDecisions(model, a, n * K);
    matches = findMatches();
    paintTop(rules, e);
    paintThumbs();
    paintPicture(selected);
    paintPanel(selected, rules, e);
  }
  function followSelection() {
    page = Math.max(0, Math.floor(matches.indexOf(model.get("selected").instance) / PAGE));
    update();
  }
  const turnKeypoint = (by) => { const { instance, keypoint } = model.get("selected"); pick(instance, (keypoint + by + K) % K); };
  const keys = {
    ArrowRight: () => step(1), ArrowLeft: () => step(-1), ArrowDown: () => turnKeypoint(1), ArrowUp: () => turnKeypoint(-1),
    "[": () => setEpoch(model.get("epoch") - 1), "]": () => setEpoch(model.get("epoch") + 1), r: () => put("rules", { ...RUN_RULES }),
  };
  function onkeydown(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select") || !keys[event.key]) return;
    event.preventDefault();
    event.stopPropagation();
    root.focus({ preventScroll: true });
    keys[event.key]();
  }
  const root = h("div", { class: "scarce", tabindex: 0, role: "group", "aria-label": bundle.title, "data-lm-suppress-shortcuts": "true", onkeydown },
    h("header", {}, h("h2", {}, bundle.title), h("p", { class: "help" }, "keys: ← → animal · ↑ ↓ keypoint · [ ] epoch · r reset rules")),
    h("div", { class: "top" }, epochs.box, ...Object.values(sliders).map((s) => s.box)),
    h("section", { class: "counts", "data-test": "counts", "aria-label": "decisions over all unlabelled keypoints" },
      h("div", {}, h("span", {}, "the run"), bars.run), h("div", {}, h("span", {}, "these rules"), bars.now), numbers, note),
    h("div", { class: "columns" },
      h("section", { class: "left" }, category, joint, kind, hasTruth ? tick(wrong, "wrong targets only") : "", tick(unlabelled, "unlabelled animals only"),
        h("div", { class: "pager" }, found, prev, pages, next), h("div", { class: "grid" }, ...thumbs)),
      h("section", { class: "middle" }, caption, picture, h("div", { class: "below" }, closeup, legend)),
      h("section", { class: "panel" }, heading, sentence, table,
        h("h4", {}, "in the run, epoch by epoch"), h("div", { class: "history" }, ...history),
        h("h4", {}, "keypoints"), h("div", { class: "list" }, ...list))));
  el.append(root);

  const events = { epoch: update, rules: update, decisions: update, selected: followSelection };
  for (const [name, f] of Object.entries(events)) model.on("change:" + name, f);
  update();
  followSelection();
  return () => {
    for (const [name, f] of Object.entries(events)) model.off("change:" + name, f);
    root.remove();
  };
}

export default { render };
