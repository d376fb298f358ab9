// Load of the experts.

/** Tokens that are looked at beside the whole, one list a model, and what they are; or null. */
function subset() {
  const list = (test) => {
    const some = [];
    for (let t = 0; t < T; t++) if (test(t)) some.push(t);
    return some;
  };
  if (state.selected) {
    const some = list(isSelected);
    return { name: "selection", lists: models.map(() => some) };
  }
  if (!state.filter && !state.inMatch) return null;
  const name = !state.filter
    ? "matches of the search"
    : state.inMatch
      ? "filter and search"
      : "tokens of the filter";
  const lists = models.map((_, m) =>
    list((t) => (!state.masks || state.masks[m][t]) && (!state.inMatch || state.inMatch[t])),
  );
  return { name, lists };
}

/** Share of tokens that each FFN expert has at balance. */
const balanceOf = (model) => (model.counts[0] ? model.wanted / model.counts[0] : 0);

/** Values of the models, said once where they agree. */
const each = (values) => [...new Set(values)].join(" and ");

function drawLoads() {
  const some = subset();
  const where = state.layer === null ? "mean of all layers" : `layer ${state.layer}`;
  $("load-title").textContent = `Load of the experts, ${where}`;
  const key = [make("span", {}, make("i"), "whole text")];
  if (some) {
    const counts = each(some.lists.map((list) => grouped(list.length)));
    key.push(make("span", {}, make("i", { class: "second" }), `${some.name}: ${counts}`));
  }
  const balance = each(models.map((model) => percent(balanceOf(model))));
  key.push(make("span", {}, make("i", { class: "dashes" }), `FFN at balance: ${balance}`));
  $("load-key").replaceChildren(...key);
  $("load").replaceChildren(
    ...models.map((model, m) => chart(model, some?.lists[m] ?? null, some?.name)),
  );
}

/** A round number not below, whose half is easy to read too. */
function roundAbove(value) {
  const size = 10 ** Math.floor(Math.log10(Math.max(value, 0.01)));
  return [1, 1.5, 2, 3, 4, 5, 6, 8, 10]
    .map((step) => step * size)
    .find((round) => round >= value - 1e-9);
}

function chart(model, some, name) {
  const box = make("div", { class: "chart" });
  if (models.length > 1) box.append(make("h3", { dir: "auto" }, model.name));
  if (!model.at(state.layer).length) {
    box.append(make("p", { class: "hint" }, `Layer ${state.layer} has no experts here.`));
    return box;
  }
  const whole = model.load(state.layer);
  const part = some?.length ? model.load(state.layer, some) : null;
  const served = [...whole.subarray(0, model.N), ...(part?.subarray(0, model.N) ?? [])];
  const top = roundAbove(Math.max(...served, balanceOf(model)));
  const plot = make("div", { class: "plot" }, ...[0.5, 1].map((share) => gridLine(share, top)));
  plot.append(bars(model, whole, part, top, name));
  if (balanceOf(model)) plot.append(balanceLine(model, top));
  box.append(plot, groupNames(model), sums(model, whole, part));
  return box;
}

const gridLine = (share, top) =>
  make(
    "div",
    { class: "grid", style: `bottom:${100 * share}%` },
    make("span", {}, `${Number((100 * share * top).toFixed(1))}%`),
  );

function bars(model, whole, part, top, partName) {
  const between = model.N > 40 ? 1 : model.N > 20 ? 2 : 4;
  const list = make("ul", {
    class: model.N > 20 ? "bars many" : "bars",
    style: `--between:${between}px`,
    "aria-label": "Share of tokens that each expert served",
  });
  for (let expert = 0; expert < model.N; expert++) {
    const kind = model.kindOf[expert];
    const name = model.expertName(expert);
    const text =
      `${name}: ${percent(whole[expert])} of the text` +
      (part ? `, ${percent(part[expert])} of the ${partName}` : "");
    const bar = make(
      "li",
      { class: `bar kind-${kind}`, title: text },
      make("span", { class: "hidden" }, text),
      make("i", { style: `height:${(100 * whole[expert]) / top}%` }),
    );
    if (part)
      bar.append(make("i", { class: "second", style: `height:${(100 * part[expert]) / top}%` }));
    bar.addEventListener("click", () => filterBy({ kind, index: expert - model.starts[kind] }));
    list.append(bar);
  }
  return list;
}

function balanceLine(model, top) {
  const height = (100 * balanceOf(model)) / top;
  const width = (100 * model.counts[0]) / model.N;
  const where = `bottom:${height}%;width:${width}%`;
  return make("div", { class: "balance", style: where });
}

function groupNames(model) {
  const room = 300 / models.length / model.N; // pixels of a bar, or so
  return make(
    "div",
    { class: "groups", "aria-hidden": "true" },
    ...kinds.map((name, kind) => {
      const count = model.counts[kind];
      return make("span", { style: `flex:${count}` }, count * room > 6 * name.length ? name : "");
    }),
  );
}

function sums(model, whole, part) {
  const table = make("table", { class: "sums" });
  const columns = part ? ["experts a token", "text", "these"] : ["experts a token", "text"];
  table.append(
    make("thead", {}, make("tr", {}, ...columns.map((name) => make("th", { scope: "col" }, name)))),
  );
  const body = make("tbody");
  const loads = (part ? [whole, part] : [whole]).map((load) => model.ofKinds(load));
  for (const kind of [0, 1, 2, 3, DROPPED]) {
    if (kind < 4 ? !model.counts[kind] : !loads[0][kind]) continue;
    const name = make(
      "th",
      { scope: "row" },
      make("span", { class: `dot kind-${kind}` }),
      kinds[kind] ?? "dropped",
    );
    body.append(
      make("tr", {}, name, ...loads.map((load) => make("td", {}, load[kind].toFixed(2)))),
    );
  }
  table.append(body);
  return table;
}
