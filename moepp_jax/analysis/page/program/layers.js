// Layers, filter.

function setLayer(number) {
  const at = clamp(number, 0, layers.length);
  state.layer = at ? layers[at - 1] : null;
  $("layer").value = at;
  const name = at ? `${state.layer} of ${layers.at(-1)}` : "mean of all";
  $("layer-name").textContent = name;
  $("layer").setAttribute("aria-valuetext", at ? `layer ${state.layer}` : name);
  [...$("profile").children].forEach((place, i) => place.classList.toggle("at", i + 1 === at));
  $("layer-back").disabled = at === 0;
  $("layer-on").disabled = at === layers.length;
  updateColours();
  updateFilter();
  drawPath();
}

/** FFN experts a token of each layer, above its place on the slider. */
function drawProfile() {
  const means = layers.map((layer) =>
    models.map((model) => {
      const counts = model.level(layer);
      return counts ? counts.reduce((sum, count) => sum + count, 0) / T : 0;
    }),
  );
  const most = Math.max(...means.flat(), 1e-9);
  $("profile").style.setProperty("--layers", layers.length);
  $("profile").append(
    ...means.map((some, i) => {
      const bars = some.map((mean) => make("i", { style: `height:${(100 * mean) / most}%` }));
      const numbers = some.map((mean) => mean.toFixed(2)).join(" and ");
      const text = `Layer ${layers[i]}: ${numbers} FFN experts a token`;
      const place = make("div", { title: text }, ...bars);
      place.addEventListener("click", () => setLayer(i + 1));
      return place;
    }),
  );
}

const stepLayer = (by) => setLayer(Number($("layer").value) + by);

function updateColours() {
  colours = colouring();
  drawLegend();
}

/** What depends on the filter and the layer. */
function updateFilter() {
  state.masks = state.filter ? models.map((model) => model.users(state.filter, state.layer)) : null;
  $("share").textContent = state.masks ? `${shares()} of tokens` : "";
  paint();
  drawLoadsSoon();
}

function shares() {
  return each(state.masks.map((mask) => percent(mask.reduce((sum, is) => sum + is, 0) / T)));
}

function filterBy(filter) {
  state.filter = filter;
  const kind = filter ? String(filter.kind) : "";
  for (const input of $("kinds").querySelectorAll("input")) input.checked = input.value === kind;
  $("expert").value = filter && filter.index !== null ? `${filter.kind}.${filter.index}` : "";
  updateFilter();
}

function makeFilters() {
  const chip = (value, name, checked) => {
    const input = make("input", { type: "radio", name: "kind", value });
    input.checked = checked;
    const mark = value === "" ? [] : [make("i", { class: `dot kind-${value}` })];
    return make("label", {}, input, make("span", {}, ...mark, name));
  };
  const there = [0, 1, 2, 3].filter((kind) => models.some((model) => model.counts[kind]));
  $("kinds").append(
    chip("", "All tokens", true),
    ...there.map((kind) => chip(String(kind), kinds[kind], false)),
    chip(String(DROPPED), "dropped", false),
  );
  $("expert").append(make("option", { value: "" }, "Any expert"));
  for (const kind of there) {
    const group = make("optgroup", { label: kinds[kind] });
    const most = Math.max(...models.map((model) => model.counts[kind]));
    for (let index = 0; index < most; index++) {
      group.append(
        make(
          "option",
          { value: `${kind}.${index}` },
          most > 1 ? `${kinds[kind]} ${index + 1}` : kinds[kind],
        ),
      );
    }
    $("expert").append(group);
  }
}
