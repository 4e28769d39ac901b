// Pseudo-label explorer: why did each keypoint of each animal get its decision?
// Index letters: e epoch (E), i sample animal (n), k keypoint (K), v visit in an epoch (V). Positions: px of the crop.

const TRUTH = 3, RELIABLE = 2, REUSABLE = 1, TEACHER_ONLY = 0, IGNORED = -1;
const KINDS = [TRUTH, RELIABLE, REUSABLE, TEACHER_ONLY, IGNORED];
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

/**
 * Decide one epoch again. all: of decodeAll; run: bundle.run_rules.
 * Returns the last visits' {decision: Int8Array (N,K), counts}.
 */
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
      const rest = has[j] || !(labelled[i] || run.confident_only) ? TEACHER_ONLY : IGNORED;
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
  if (data instanceof ArrayBuffer) return new Int8Array(data);
  return new Int8Array(data.buffer, data.byteOffset, data.byteLength);
}

const point = (xy, j) => [xy[2 * j], xy[2 * j + 1]];
const known = ([x, y]) => Number.isFinite(x) && Number.isFinite(y);

/** What is known of one keypoint under decision d. j: place in (n,K); ej: place in (E,n,K). */
function factsOf(a, j, ej, d) {
  const label = point(a.label_xy, j), student = point(a.student_xy, ej), ran = a.decision[ej];
  const labelRight = a.label_right ? a.label_right[j] : -1;
  let right = d === REUSABLE ? -1 : labelRight; // another target than the run's is judged only if it is the label
  if (d === ran && a.right) right = a.right[ej];
  return {
    d, ran, label, labelRight, right, student, target: d === REUSABLE ? student : label,
    weak: point(a.weak_xy, ej), teacher: point(a.teacher_xy, ej),
    truth: a.truth_xy && a.truth_known[j] ? point(a.truth_xy, j) : [NaN, NaN],
    score: a.score[j], has: a.has_label[j] > 0, loss: a.loss[ej],
    rank: a.rank[ej], quota: a.quota[ej], distance: a.distance[ej],
  };
}

const apart = ([x1, y1], [x2, y2]) => Math.hypot(x1 - x2, y1 - y2);
const judged = (right) => ["unknown", "wrong", "right"][right + 1];
const spaced = (count) => count.toLocaleString("en-US");

/** Why the loss of keypoint facts f did not make its label reliable. */
function whyNotReliable(f, rules) {
  if (!f.has && rules.drop === null) return "its confidence is below the cut";
  if (rules.keep !== null || rules.drop !== null) return "its loss is not among the smallest of its batch";
  return f.rank < 0 ? "it has no loss to compare" : `its loss is too large (rank ${f.rank + 1}, quota ${f.quota})`;
}

/** One plain sentence: why keypoint facts f got its decision. */
function verdict(f, labelled, rules, agree, kinds) {
  const loss = whyNotReliable(f, rules);
  const agreement = Number.isFinite(f.distance)
    ? `its two predictions differ by ${f.distance.toFixed(2)} heatmap px` : "its two predictions cannot be compared";
  const unused = labelled ? "this keypoint is not annotated" : `${loss} and ${agreement}`;
  const why = {
    [TRUTH]: "Human label, used as it is",
    [RELIABLE]: "The pseudo-label is used, because its loss is among the smallest of its batch",
    [REUSABLE]: `The student's prediction replaces the pseudo-label: ${loss}, `
      + `but two predictions agree within ${agree} heatmap px`,
    [TEACHER_ONLY]: `No label is used, only the teacher's prediction: ${unused}`,
    [IGNORED]: `Left out of the training step: ${unused}`,
  }[f.d];
  const truth = f.d < REUSABLE ? "" : { 0: "; the target is wrong", 1: "; the target is right" }[f.right] || "";
  return why + truth + (f.d === f.ran ? "." : ` (the run itself decided: ${kinds[f.ran]}).`);
}

// ---- drawing ---------------------------------------------------------------------------------------------------

const SVG = new Set(["svg", "g", "line", "circle", "path", "image"]);

/** New HTML or SVG element; attributes beginning with "on" are listeners. */
function h(tag, attrs = {}, ...children) {
  const svg = SVG.has(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
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
  const links = known(f.label) ? names.map((name) => lineTo(f.label, f[name], "link")) : [];
  return [...links, ...names.map((name) => marker(name, f[name], r))];
}

const swatch = (colour) => h("i", { class: "swatch", style: `background:${colour}` });

/** Stacked bar of counts {kind: number}, named in words by its title. */
function paintBar(bar, counts, { kinds, colours }) {
  const present = KINDS.filter((kind) => counts[kind]);
  const total = present.reduce((sum, kind) => sum + counts[kind], 0);
  const part = (kind) => h("span", { style: `flex-grow:${counts[kind] / total};background:${colours[kind]}` });
  const words = (kind) => `${kinds[kind]} ${spaced(counts[kind])} (${(100 * counts[kind] / total).toFixed(0)}%)`;
  bar.replaceChildren(...present.map(part));
  bar.title = present.map(words).join(", ");
  bar.setAttribute("aria-label", bar.title);
}

// ---- the explorer: a context that all parts share, the parts, and `render`, which puts them together -----------

/** What the parts of an explorer share: the data, what is shown now, and the ways to change it. */
function makeContext(model) {
  const bundle = model.get("bundle"), a = decodeEach(bundle.arrays);
  const n = bundle.instances.length, K = bundle.names.length, E = bundle.epochs.length;
  const put = (name, value) => {
    model.set(name, value);
    model.save_changes();
  };
  const context = {
    model, bundle, a, n, K, E, hasTruth: Boolean(a.right || a.label_right),
    decisions: null, // Int8Array (n,K) shown now
    matches: [], // the animals that pass the filters
    page: 0, // of the thumbnails
    facts(i, k) {
      const j = i * K + k, e = model.get("epoch");
      return factsOf(a, j, e * n * K + j, context.decisions[j]);
    },
    select: (instance, keypoint) => put("selected", { instance, keypoint }),
    setEpoch: (e) => put("epoch", Math.max(0, Math.min(E - 1, e))),
    setRule: (name, value) => put("rules", { ...model.get("rules"), [name]: value }),
    resetRules: () => put("rules", { ...RUN_RULES }),
  };
  return context;
}

/** Menus and boxes that choose among the animals; `refilter` is called after each change. */
function makeFilters(context, refilter) {
  const { bundle, K, hasTruth, facts } = context, { instances, names, kinds } = bundle;
  const menu = (test, label, pairs) => h("select", { "data-test": test, "aria-label": label, onchange: refilter },
    ...[["", `any ${label}`], ...pairs].map(([value, text]) => h("option", { value }, text)));
  const check = (test) => h("input", { type: "checkbox", "data-test": test, onchange: refilter });
  const categories = [...new Set(instances.map((x) => x.category))].sort();
  const category = menu("category", "category", categories.map((c) => [c, c]));
  const keypoint = menu("keypoint", "keypoint", names.map((name, k) => [k, name]));
  const kind = menu("kind", "decision", KINDS.map((d) => [d, kinds[d]]));
  const wrong = check("wrong"), unlabelled = check("unlabelled"), suggested = check("suggested");
  const hasRanks = instances.some((animal) => animal.rank);

  /** Does keypoint k of animal i pass the filters on keypoints? */
  const passes = (i, k) => (keypoint.value === "" || k === Number(keypoint.value))
    && (kind.value === "" || context.decisions[i * K + k] === Number(kind.value))
    && (!wrong.checked || facts(i, k).right === 0);
  const firstPassing = (i) => names.findIndex((_, k) => passes(i, k));
  const matches = (animal, i) => (category.value === "" || animal.category === category.value)
    && !(unlabelled.checked && animal.labelled) && !(suggested.checked && !animal.rank) && firstPassing(i) >= 0;
  const findMatches = () => instances.map((_, i) => i).filter((i) => matches(instances[i], i));

  const nodes = [category, keypoint, kind, hasTruth ? h("label", {}, wrong, "wrong targets only") : "",
    h("label", {}, unlabelled, "unlabelled animals only"),
    hasRanks ? h("label", {}, suggested, "suggested to be labelled only") : ""];
  return { nodes, passes, firstPassing, findMatches };
}

/** The animals that pass the filters, a page at a time; `choose(i)` goes to animal i, `update()` paints anew. */
function makeThumbnails(context, choose, update) {
  const { model, bundle, n, K } = context, { instances } = bundle;
  const found = h("p", { "data-test": "matches", role: "status" });
  const turner = (test, label, by, text) => h("button", { "data-test": test, "aria-label": label, onclick: () => {
    context.page += by;
    update();
  } }, text);
  const prev = turner("prev", "previous page", -1, "‹ prev"), next = turner("next", "next page", 1, "next ›");
  const pages = h("span");
  const thumbs = Array.from({ length: PAGE }, (_, slot) => {
    const onclick = () => choose(context.matches[context.page * PAGE + slot]);
    return h("button", { class: "thumb", onclick }, h("img", { alt: "" }), h("span", { class: "bar" }));
  });

  function paintThumb(thumb, i) {
    const [img, bar] = thumb.children, { image, category, file } = instances[i];
    if (img.getAttribute("src") !== image) img.src = image;
    const counts = {};
    for (const d of context.decisions.subarray(i * K, i * K + K)) counts[d] = (counts[d] || 0) + 1;
    paintBar(bar, counts, bundle);
    thumb.title = `${category}, ${file}: ${bar.title}`;
    thumb.setAttribute("aria-label", thumb.title);
    thumb.setAttribute("aria-pressed", i === model.get("selected").instance);
  }
  function paint() {
    const { matches } = context, last = Math.max(0, Math.ceil(matches.length / PAGE) - 1);
    context.page = Math.min(context.page, last);
    found.textContent = `${matches.length} of ${n} animals`;
    pages.textContent = `${context.page + 1} / ${last + 1}`;
    prev.disabled = context.page === 0;
    next.disabled = context.page === last;
    thumbs.forEach((thumb, slot) => {
      const i = matches[context.page * PAGE + slot];
      thumb.hidden = i === undefined;
      if (!thumb.hidden) paintThumb(thumb, i);
    });
  }
  const pager = h("div", { class: "pager" }, found, prev, pages, next);
  return { nodes: [pager, h("div", { class: "grid" }, ...thumbs)], paint };
}

/** The selected animal with its keypoints, a close-up of the selected one, and the legend. */
function makeImage(context) {
  const { model, bundle, a, hasTruth, facts, select } = context, { names, bones, sides, kinds, colours } = bundle;
  const caption = h("p", { class: "caption" });
  const image = h("image"), overlay = h("g");
  const picture = h("svg", { class: "picture", role: "img", "aria-label": "animal with keypoints" }, image, overlay);
  const enlarged = h("image"), enlargedOverlay = h("g", { class: "disc" });
  const closeup = h("svg", { class: "picture closeup", role: "img", "aria-label": "close-up of the selected keypoint" },
    enlarged, enlargedOverlay);
  const glyph = (name) => h("svg", { viewBox: "-1.4 -1.4 2.8 2.8", "aria-hidden": "true" }, marker(name, [0, 0], 1));
  const marks = Object.keys(SHAPES).filter((name) => name !== "truth" || a.truth_xy);
  const legend = h("p", { class: "legend" },
    ...marks.map((name) => h("span", {}, glyph(name), SHAPES[name][0])),
    hasTruth ? h("span", {}, h("i", { class: "ring" }), "wrong target") : "",
    h("span", {}, h("i", { class: "dashes" }), "right side"));

  function showImage({ image: href, width, height }, margin) {
    if (image.getAttribute("href") === href) return;
    picture.setAttribute("viewBox", [-margin - 0.5, -margin - 0.5, width + 2 * margin, height + 2 * margin].join(" "));
    const place = { href, width, height, x: -0.5, y: -0.5 }; // a position is whole in the middle of a pixel
    for (const copy of [image, enlarged]) {
      for (const [name, value] of Object.entries(place)) copy.setAttribute(name, value);
    }
  }
  /** Keypoint k of animal i, with facts f, as a dot of radius r that can be clicked; a wrong target has a ring. */
  function disc(i, k, { d, right, target: [cx, cy] }, r, room) {
    const node = h("g", { class: "disc", "data-test": `disc-${k}`, onclick: () => select(i, k) },
      h("circle", { cx, cy, r, fill: colours[d] }),
      right === 0 ? h("circle", { cx, cy, r: r + room, class: "wrong" }) : "");
    const title = document.createElementNS(node.namespaceURI, "title");
    title.textContent = `${names[k]}: ${kinds[d]}${right === 0 ? ", target wrong" : ""}`;
    node.append(title);
    return node;
  }
  /** The selected keypoint's facts f, enlarged so that all its markers are seen; at least 2 * least crop px wide. */
  function paintCloseup(f, least) {
    closeup.style.visibility = known(f.target) ? "visible" : "hidden";
    if (!known(f.target)) return;
    const [cx, cy] = f.target;
    const half = 1.3 * Math.max(least, ...shownMarks(f).map((name) => apart(f[name], f.target)));
    closeup.setAttribute("viewBox", [cx - half, cy - half, 2 * half, 2 * half].join(" "));
    enlargedOverlay.replaceChildren(h("circle", { cx, cy, r: 0.14 * half, fill: colours[f.d] }),
      ...marksOf(f, 0.08 * half));
  }
  function paint() {
    const { instance: i, keypoint } = model.get("selected"), animal = bundle.instances[i];
    const unit = Math.max(animal.width, animal.height) / 100;
    showImage(animal, 3 * unit);
    const { category, family, file, labelled, rank, reason } = animal;
    const wanted = rank ? ` · suggested, no. ${rank}: ${reason}` : "";
    caption.replaceChildren(h("b", {}, category),
      ` (${family}) · ${file} · ${labelled ? "human labels" : "unlabelled"}${wanted}`);
    const all = names.map((_, k) => facts(i, k));
    const onRight = (bone) => bone.some((k) => sides[k] === "right");
    const lines = bones.filter((bone) => bone.every((k) => known(all[k].target)))
      .map(([p, q]) => lineTo(all[p].target, all[q].target, onRight([p, q]) ? "bone right" : "bone"));
    const discs = all.flatMap((f, k) => (known(f.target)
      ? disc(i, k, f, (k === keypoint ? 2.4 : 1.6) * unit, 0.9 * unit) : []));
    overlay.replaceChildren(...lines, ...discs, ...marksOf(all[keypoint], 1.3 * unit));
    paintCloseup(all[keypoint], 2 * unit);
  }
  return { nodes: [caption, picture, h("div", { class: "below" }, closeup, legend)], paint };
}

/** The facts about the selected keypoint, its history, and the list of the animal's keypoints. */
function makePanel(context) {
  const { model, bundle, a, n, K, hasTruth, facts, select, setEpoch } = context;
  const { names, kinds, colours, instances, run_rules: run } = bundle;
  const heading = h("h3"), sentence = h("p", { class: "verdict", "data-test": "verdict", role: "status" });
  const table = h("table");
  const history = bundle.epochs.map((epoch, e) => h("button", { class: "square", onclick: () => setEpoch(e) }));
  const list = names.map((name, k) => h("button",
    { "data-test": `keypoint-${k}`, onclick: () => select(model.get("selected").instance, k) }));

  /** The table's rows [what, value] about facts f. */
  function rowsOf(f, labelled, agree) {
    const cut = labelled ? "" : f.has ? ", above the run's cut" : ", below the run's cut";
    const near = `${f.distance < Math.fround(agree) ? "under" : "not under"} ${agree}`;
    const rows = [
      ["confidence", f.score.toFixed(3) + cut],
      ["loss", Number.isNaN(f.loss) ? "none" : f.loss.toPrecision(3)],
      ["place in its batch", f.rank < 0 ? "did not compete" : `rank ${f.rank + 1}, quota ${f.quota} (run)`],
      ["predictions apart", Number.isNaN(f.distance) ? "none" : `${f.distance.toFixed(2)} heatmap px, ${near}`],
      ["target moved", f.d < REUSABLE ? "no label used" : `${apart(f.target, f.label).toFixed(2)} crop px`],
    ];
    if (!hasTruth) return rows;
    const use = f.d < REUSABLE ? ", not used" : "";
    return [...rows, ["label", judged(f.labelRight)], ["target", judged(f.right) + use]];
  }
  function paintHistory(i, k, e) {
    history.forEach((square, at) => {
      const d = a.decision[(at * n + i) * K + k];
      square.style.background = colours[d];
      square.title = `epoch ${bundle.epochs[at]}: ${kinds[d]}`;
      square.setAttribute("aria-label", square.title);
      square.setAttribute("aria-current", at === e);
    });
  }
  function paint() {
    const { instance: i, keypoint: k } = model.get("selected"), rules = model.get("rules");
    const f = facts(i, k), { labelled } = instances[i], agree = rules.agree_px ?? run.agree_px;
    heading.replaceChildren(names[k], h("span", { class: "chip" }, swatch(colours[f.d]), kinds[f.d]));
    sentence.textContent = verdict(f, labelled, rules, agree, kinds);
    table.replaceChildren(...rowsOf(f, labelled, agree).map(([what, value]) =>
      h("tr", {}, h("th", { scope: "row" }, what), h("td", {}, value))));
    paintHistory(i, k, model.get("epoch"));
    list.forEach((row, at) => {
      const { d, right } = facts(i, at);
      const words = kinds[d] + (right === 0 ? " ✗ wrong" : "");
      row.replaceChildren(swatch(colours[d]), names[at], h("small", {}, words));
      row.setAttribute("aria-pressed", at === k);
    });
  }
  const nodes = [heading, sentence, table,
    h("h4", {}, "in the run, epoch by epoch"), h("div", { class: "history" }, ...history),
    h("h4", {}, "keypoints"), h("div", { class: "list" }, ...list)];
  return { nodes, paint };
}

/** The sliders for the epoch and the rules; below them the counts, of the run and under these rules. */
function makeSliders(context) {
  const { model, bundle, E, setEpoch, setRule } = context, { kinds, colours, run_rules: run } = bundle;

  function slider(test, label, attrs, set, reset) {
    const output = h("output"), oninput = (event) => set(Number(event.target.value));
    const input = h("input", { type: "range", "data-test": test, "aria-label": label, ...attrs, oninput });
    const box = h("div", { class: "slider" }, h("span", {}, label, output), input, reset || "");
    return { input, output, reset, box };
  }
  function rule(name, label, max, step) {
    const reset = h("button", { "data-test": `${name}-reset`, "aria-label": `${label}: run's own`,
      onclick: () => setRule(name, null) }, "run's own");
    return slider(name, label, { min: 0, max, step }, (value) => setRule(name, value), reset);
  }
  const epochs = slider("epoch", "epoch", { min: 0, max: E - 1, step: 1 }, setEpoch);
  const rules = {
    keep: rule("keep", "keep small losses", 1, 0.01),
    agree_px: rule("agree_px", "agree within, px", 3, 0.05),
    drop: rule("drop", "drop least confident", 0.99, 0.01),
  };
  const note = h("p", { class: "note", "data-test": "note", role: "status" });
  const bars = { run: h("div", { class: "bar", role: "img" }), now: h("div", { class: "bar", role: "img" }) };
  const numbers = h("p", { class: "legend" });

  function paintCounts(changed) {
    const { counts = {}, run_counts: own } = model.get("decisions") || {};
    bars.run.parentElement.hidden = !own;
    if (own) paintBar(bars.run, own, bundle);
    paintBar(bars.now, counts, bundle);
    const before = (d) => (own && changed ? `${spaced(own[d] || 0)} → ` : "");
    numbers.replaceChildren(...KINDS.filter((d) => d !== TRUTH).map((d) => h("span", {},
      swatch(colours[d]), `${kinds[d]} `, h("b", {}, before(d) + spaced(counts[d] || 0)))));
  }
  function paint() {
    const asked = model.get("rules"), e = model.get("epoch");
    epochs.input.value = e;
    epochs.output.textContent = bundle.epochs[e];
    for (const [name, { input, output, reset }] of Object.entries(rules)) {
      const value = asked[name] ?? (name === "keep" ? run.keep[e] : run[name]);
      input.value = value;
      output.textContent = Number(value.toFixed(3)) + (asked[name] === null ? " (run)" : "");
      reset.disabled = asked[name] === null;
    }
    const changed = Object.keys(rules).some((name) => asked[name] !== null);
    note.textContent = changed ? "What if: one step with the network as it was, not a retraining" : "";
    note.style.visibility = changed ? "visible" : "hidden";
    paintCounts(changed);
  }
  const label = "decisions over all unlabelled keypoints";
  const nodes = [
    h("div", { class: "top" }, epochs.box, ...Object.values(rules).map((s) => s.box)),
    h("section", { class: "counts", "data-test": "counts", "aria-label": label },
      h("div", {}, h("span", {}, "the run"), bars.run), h("div", {}, h("span", {}, "these rules"), bars.now),
      numbers, note),
  ];
  return { nodes, paint };
}

/** Keys that move through animals, keypoints and epochs; `step(by)` goes to another animal. */
function keyHandler({ model, K, select, setEpoch, resetRules }, step) {
  const turnKeypoint = (by) => {
    const { instance, keypoint } = model.get("selected");
    select(instance, (keypoint + by + K) % K);
  };
  const keys = {
    ArrowRight: () => step(1), ArrowLeft: () => step(-1),
    ArrowDown: () => turnKeypoint(1), ArrowUp: () => turnKeypoint(-1),
    "[": () => setEpoch(model.get("epoch") - 1), "]": () => setEpoch(model.get("epoch") + 1), r: resetRules,
  };
  return (event) => {
    const modified = event.ctrlKey || event.metaKey || event.altKey;
    if (modified || event.target.matches("input, select") || !keys[event.key]) return;
    event.preventDefault();
    event.stopPropagation();
    event.currentTarget.focus({ preventScroll: true });
    keys[event.key]();
  };
}

function render({ model, el }) {
  const context = makeContext(model), { bundle, a, n, K, select } = context;
  const filters = makeFilters(context, refilter), thumbnails = makeThumbnails(context, choose, update);
  const image = makeImage(context), panel = makePanel(context), sliders = makeSliders(context);

  /** Go to animal i, one of the matches: to the same keypoint if it passes the filters, else to the first that does. */
  function choose(i) {
    const { keypoint } = model.get("selected");
    select(i, filters.passes(i, keypoint) ? keypoint : filters.firstPassing(i));
  }
  function step(by) {
    const { matches } = context, now = model.get("selected").instance;
    const to = by > 0 ? matches.find((i) => i > now) : matches.filter((i) => i < now).pop();
    if (to !== undefined) choose(to);
  }
  function refilter() {
    const matches = filters.findMatches(), { instance } = model.get("selected");
    context.matches = matches;
    if (matches.length) choose(matches.includes(instance) ? instance : matches[0]);
    followSelection();
  }
  function update() {
    context.decisions = shownDecisions(model, a, n * K);
    context.matches = filters.findMatches();
    for (const part of [sliders, thumbnails, image, panel]) part.paint();
  }
  function followSelection() {
    context.page = Math.max(0, Math.floor(context.matches.indexOf(model.get("selected").instance) / PAGE));
    update();
  }

  const help = "keys: ← → animal · ↑ ↓ keypoint · [ ] epoch · r reset rules";
  const root = h("div", { class: "scarce", tabindex: 0, role: "group", "aria-label": bundle.title,
    "data-lm-suppress-shortcuts": "true", onkeydown: keyHandler(context, step) },
  h("header", {}, h("h2", {}, bundle.title), h("p", { class: "help" }, help)),
  ...sliders.nodes,
  h("div", { class: "columns" },
    h("section", { class: "left" }, ...filters.nodes, ...thumbnails.nodes),
    h("section", { class: "middle" }, ...image.nodes),
    h("section", { class: "panel" }, ...panel.nodes)));
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
