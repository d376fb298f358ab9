// A token's way through the layers.

const quoted = (text) => make("bdi", { class: "quoted" }, text);

function facts(t) {
  const [start, source, document, position] = segmentOf(t);
  const [name, kind] = sources[source] ?? ["text", ""];
  const list = make("dl", { class: "facts" });
  const add = (term, ...what) => list.append(make("dt", {}, term), make("dd", {}, ...what));
  add("Id", String(arrays.token[t]));
  add(kind ? kind[0].toUpperCase() + kind.slice(1) : "Source", make("bdi", {}, name));
  add("Document", grouped(document));
  add("Position", grouped(position + t - start));
  const follows = models.some((model) => model.loss(t) !== null);
  add(
    "Followed by",
    !follows ? "no token" : t + 1 < T ? quoted(shownOf(t + 1)) : "a token past the end",
  );
  if (models.length === 1 && follows) add("Its loss", nats(models[0].loss(t)));
  return list;
}

const nats = (loss) => (loss === null ? "none" : `${loss.toFixed(3)} nats`);

/** Of several models, side by side as their ways are. */
const lossRow = (t) =>
  make(
    "tr",
    {},
    make("th", { scope: "row" }, "Loss"),
    ...models.map((model) => make("td", {}, nats(model.loss(t)))),
  );

function choiceChip(model, j, k, t) {
  const choice = model.plane(j, k)[t];
  const kind = model.kindOf[choice];
  if (kind === UNUSED) return make("span", { class: "choice unused" }, "unused");
  const gate = model.gate(j, k, t);
  const highest = Math.max(model.gates[1], 1);
  const expert = kind === DROPPED ? choice - model.N - 1 : choice;
  const name = model.expertName(expert);
  const chip = make("span", {
    class: `choice kind-${model.kindOf[expert]}${kind === DROPPED ? " dropped" : ""}`,
    style: `--gate:${((100 * Math.max(gate, 0)) / highest).toFixed(1)}%`,
  });
  chip.append(
    make("span", { class: "dot" }),
    kind === DROPPED ? make("s", {}, name) : name,
    make("em", {}, gate.toFixed(2)),
  );
  if (kind === DROPPED) chip.append(make("em", {}, "dropped"));
  return chip;
}

function way(t) {
  const table = make("table", { class: "way" });
  const heads = models.length > 1 ? models.map((model) => model.name) : ["Experts and their gates"];
  table.append(
    make(
      "thead",
      {},
      make(
        "tr",
        {},
        ...["Layer", ...heads].map((name) => make("th", { scope: "col", dir: "auto" }, name)),
      ),
    ),
  );
  const body = make("tbody");
  if (models.length > 1) body.append(lossRow(t));
  for (const layer of layers) {
    const cells = models.map((model) => {
      const chips = model
        .at(layer)
        .flatMap((j) => Array.from({ length: model.K }, (_, k) => choiceChip(model, j, k, t)));
      return make("td", {}, ...chips);
    });
    body.append(
      make(
        "tr",
        layer === state.layer ? { class: "at" } : {},
        make("th", { scope: "row" }, String(layer)),
        ...cells,
      ),
    );
  }
  table.append(body);
  return table;
}

function drawPath() {
  const t = state.hover ?? state.active;
  $("path").replaceChildren(make("div", { class: "what" }, shownOf(t)), facts(t), way(t));
}

/** For those who hear the page: a token in one sentence. */
function spoken(t) {
  const parts = [shownOf(t)];
  for (const model of models) {
    const levels = model.level(state.layer);
    const loss = model.loss(t);
    if (models.length > 1) parts.push(model.name);
    if (levels) parts.push(`${levels[t].toFixed(state.layer === null ? 2 : 0)} FFN experts`);
    if (state.layer !== null) {
      for (const j of model.at(state.layer)) {
        for (let k = 0; k < model.K; k++) parts.push(choiceChip(model, j, k, t).textContent);
      }
    }
    parts.push(loss === null ? "no token follows" : `loss ${loss.toFixed(2)}`);
  }
  return parts.join(", ");
}

/** The token that keys start from, and whose way is shown unless another is under the mouse. */
function settle(t) {
  state.active = t;
  $("text").setAttribute("aria-activedescendant", `t${t}`);
  tellPlace(t);
  drawPath();
}

function activate(t, { extend = false, scroll = true } = {}) {
  const before = state.active;
  const repaint = extend || state.selected;
  state.selected = extend ? [state.selected?.[0] ?? before, t] : null;
  settle(t);
  if (scroll) show(t);
  if (repaint) {
    paint();
    drawLoadsSoon();
  } else paintTokens(before, t);
  $("said").textContent = spoken(t);
}

function hover(t) {
  if (t === state.hover) return;
  const before = state.hover;
  state.hover = t;
  paintTokens(before, t);
  drawPath();
}

/** Once a frame, however often it is asked for. */
function soon(work) {
  let asked = false;
  return () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => {
      asked = false;
      work();
    });
  };
}

const drawLoadsSoon = soon(drawLoads);
const drawSoon = soon(draw);
