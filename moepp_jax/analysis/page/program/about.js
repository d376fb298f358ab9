// The head of the page.

function fact(name, value) {
  return make("div", {}, make("dt", {}, name), make("dd", { dir: "auto" }, value));
}

const said = (value) =>
  value !== null && typeof value === "object" ? JSON.stringify(value) : String(value);

function ruleOf({ rule }) {
  const { type, ...options } = rule;
  const rest = Object.entries(options).map(([name, value]) => `${name} ${said(value)}`);
  return [...(type === undefined ? [] : [said(type)]), ...rest].join(" · ");
}

function poolOf({ counts, most }) {
  const parts = counts.map((count, kind) => (count ? `${count} ${kinds[kind]}` : null));
  return `${parts.filter(Boolean).join(" + ")}, at most ${most} a token`;
}

function aboutRun(model) {
  const tokens = model.total > T ? `${grouped(T)} of ${grouped(model.total)}` : grouped(T);
  return make(
    "div",
    { class: "run" },
    make("h1", { dir: "auto" }, model.name),
    make(
      "dl",
      {},
      fact("Step", grouped(model.step)),
      fact("Routing", ruleOf(model)),
      fact("Experts", poolOf(model)),
      fact("Tokens", tokens),
      fact("FFN experts a token", model.meanFfn.toFixed(2)),
      fact("Loss", model.meanLoss === null ? "unknown" : `${model.meanLoss.toFixed(3)} nats`),
    ),
  );
}

function drawAbout() {
  $("about").replaceChildren(...models.map(aboutRun));
}

function drawColumns() {
  const named =
    models.length < 2
      ? []
      : state.difference
        ? [`${models[0].name} − ${models[1].name}`]
        : models.map((model) => model.name);
  $("columns").replaceChildren(...named.map((name) => make("div", { dir: "auto" }, name)));
}
