// Colours.

// From almost paper to deep blue, and on dark from almost night to yellow: more is more contrast.
// Both rise evenly in lightness, and mean the same to the colour-blind.
const SEQUENTIAL = [
  "#f3f0e2 #e6edcd #c8e3c6 #9dd2c6 #70bccb #4a9fc6 #357db5 #2d5c9c #2a3f7c",
  "#20262f #23364f #22496e #1f6182 #257d8c #3b9a8a #6cb879 #b0d166 #f3e468",
].map((stops) => stops.split(" "));
const DIVERGING = [
  "#4b2a86 #7a65ad #ada2cf #dcd8e8 #f4f2ee #f8dfbd #efb368 #cd7a1b #8f4708",
  "#b9a5f0 #8c78cb #614f9b #3c3563 #23272e #57401f #8f611b #cd8b24 #ffc266",
].map((stops) => stops.split(" "));
const INKS = ["#1b1e24", "#f2f4f7", "#ffffff", "#000000"];

const channels = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));

function along(stops, share) {
  const at = share * (stops.length - 1);
  const left = Math.min(Math.floor(at), stops.length - 2);
  const from = channels(stops[left]);
  const to = channels(stops[left + 1]);
  const mixed = from.map((value, i) => Math.round(value + (to[i] - value) * (at - left)));
  return `#${mixed.map((value) => value.toString(16).padStart(2, "0")).join("")}`;
}

function luminance(hex) {
  const [r, g, b] = channels(hex).map((value) => {
    const v = value / 255;
    return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

function contrast(a, b) {
  const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
  return (high + 0.05) / (low + 0.05);
}

/** The softest that can be read: 4.5 is what WCAG asks, and white or black always has it. */
const inkOn = (color) => INKS.find((ink) => contrast(ink, color) >= 4.5);

function styleScales() {
  const rules = [];
  for (const [letter, scales] of [
    ["c", SEQUENTIAL],
    ["d", DIVERGING],
  ]) {
    for (let bin = 0; bin < BINS; bin++) {
      const [light, dark] = scales.map((stops) => along(stops, bin / (BINS - 1)));
      rules.push(
        `.${letter}${bin} { background: light-dark(${light}, ${dark}); ` +
          `color: light-dark(${inkOn(light)}, ${inkOn(dark)}); }`,
      );
    }
  }
  document.head.append(make("style", {}, rules.join("\n")));
}

/** The levels between which nearly all tokens lie, to tenths. */
function usual(values, share) {
  const sorted = Float32Array.from(values).sort();
  const at = (part) => sorted[Math.round(part * (sorted.length - 1))];
  return [Math.floor(10 * at(share)) / 10, Math.ceil(10 * at(1 - share)) / 10];
}

function differences(layer) {
  const [a, b] = models.map((model) => model.level(layer));
  return a && b ? Float32Array.from(a, (value, t) => value - b[t]) : null;
}

/** What is coloured: a level of each token in each column, and the ends of the scale. */
function colouring() {
  const one = state.layer !== null;
  const most = Math.max(...models.map((model) => Math.min(model.K, model.counts[0])), 1);
  if (state.difference) {
    const levels = [differences(state.layer)];
    const far = one || !levels[0] ? most : Math.max(...usual(levels[0], 0.01).map(Math.abs), 0.1);
    return { letter: "d", low: -far, high: far, levels, most, steps: one ? 2 * most + 1 : 0 };
  }
  const levels = models.map((model) => model.level(state.layer));
  let [low, high] = [0, most];
  if (!one) {
    const ends = levels.map((values) => usual(values, 0.01));
    const [least, greatest] = [
      Math.min(...ends.map((e) => e[0])),
      Math.max(...ends.map((e) => e[1])),
    ];
    if (greatest - least > 0.15) [low, high] = [least, greatest];
  }
  return { letter: "c", low, high, levels, most, steps: one ? most + 1 : 0 };
}

let colours = colouring();

function binOf(value) {
  const share = (value - colours.low) / (colours.high - colours.low);
  return Math.round(clamp(share, 0, 1) * (BINS - 1));
}

function colourOf(column, t) {
  const levels = colours.levels[column];
  return levels ? `${colours.letter}${binOf(levels[t])}` : "";
}

function drawLegend() {
  const { letter, low, high, most, steps } = colours;
  const name = state.difference
    ? `FFN experts: ${models[0].name} − ${models[1].name}`
    : "FFN experts a token";
  const count = steps || BINS;
  const swatches = make("div", { class: "swatches" });
  for (let i = 0; i < count; i++) {
    const bin = Math.round((i / Math.max(count - 1, 1)) * (BINS - 1));
    swatches.append(make("i", { class: `${letter}${bin}` }));
  }
  const marks = steps
    ? Array.from({ length: steps }, (_, i) => signed(low + i, 0))
    : [0, 1, 2].map((i) => signed(low + (i * (high - low)) / 2, 2));
  if (low > (letter === "d" ? -most : 0)) marks[0] = `≤ ${marks[0]}`;
  if (high < most) marks[marks.length - 1] = `≥ ${marks.at(-1)}`;
  const scale = make(
    "div",
    { class: steps ? "scale steps" : "scale" },
    swatches,
    make("div", { class: "marks" }, ...marks.map((mark) => make("span", {}, mark))),
  );
  const caption = make("figcaption", {}, state.difference ? "Difference in FFN experts" : name);
  $("legend").replaceChildren(caption, scale);
  $("legend").setAttribute(
    "aria-label",
    `Scale of colours, ${name}: from ${marks[0]} to ${marks.at(-1)}`,
  );
  $("legend").title = name;
}

function signed(value, digits) {
  const text = Math.abs(value).toFixed(digits);
  if (!state.difference || Number(text) === 0) return text;
  return (value < 0 ? "−" : "+") + text;
}
