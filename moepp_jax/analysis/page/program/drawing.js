// Drawing: only lines in sight are there.

const drawn = new Map(); // line -> { row, cells: a list of spans a column }

function describeSegment(number) {
  const [, source, document, position] = segments[number];
  const from = position ? `, from position ${grouped(position)}` : "";
  return [sources[source]?.[0] ?? "text", `document ${grouped(document)}${from}`];
}

function drawHead(line) {
  const [source, rest] = describeSegment(lines.heads[line]);
  const row = make("div", { class: "row head", role: "presentation" });
  row.append(make("div", {}, make("b", { dir: "auto" }, source), rest));
  return { row, cells: [] };
}

function makeToken(column, t) {
  const span = make("span", { "data-t": t, "data-column": column }, shownOf(t));
  if (column) return span; // the same text once more, which is hidden from who hears the page
  span.id = `t${t}`;
  span.setAttribute("role", "option");
  span.setAttribute("aria-posinset", t + 1);
  span.setAttribute("aria-setsize", T);
  return span;
}

function drawLine(line) {
  if (lines.heads[line] !== null) return drawHead(line);
  const row = make("div", { class: "row", role: "presentation" });
  const cells = columnsOf().map((_, column) => {
    const spans = [];
    for (let t = lines.starts[line]; t < lines.ends[line]; t++) spans.push(makeToken(column, t));
    row.append(
      make(
        "div",
        column ? { class: "line", "aria-hidden": "true" } : { class: "line", role: "presentation" },
        ...spans,
      ),
    );
    return spans;
  });
  return { row, cells };
}

function draw() {
  const text = $("text");
  const top = text.scrollTop;
  const margin = 300;
  const from = Math.max(below(lines.tops, top - margin), 0);
  const to = Math.max(below(lines.tops, top + text.clientHeight + margin), 0);
  for (const [line, { row }] of drawn) {
    if (line < from || line > to) {
      row.remove();
      drawn.delete(line);
    }
  }
  for (let line = from; line <= to; line++) if (!drawn.has(line)) place(line);
}

function place(line) {
  const made = drawLine(line);
  made.row.style.transform = `translateY(${lines.tops[line]}px)`;
  drawn.set(line, made);
  paintLine(made);
  const after = [...drawn.keys()].filter((other) => other > line);
  // In the order of the text, for who reads it from the document.
  if (after.length) drawn.get(Math.min(...after)).row.before(made.row);
  else $("sheet").append(made.row);
}

function redraw() {
  for (const { row } of drawn.values()) row.remove();
  drawn.clear();
  draw();
}

function isSelected(t) {
  if (!state.selected) return false;
  const [a, b] = state.selected;
  return t >= Math.min(a, b) && t <= Math.max(a, b);
}

function matchesFilter(column, t) {
  if (!state.masks) return true;
  return state.difference ? state.masks.some((mask) => mask[t]) : Boolean(state.masks[column][t]);
}

function isNow(t) {
  const { starts, ends, now } = state.matches;
  return now >= 0 && t >= starts[now] && t < ends[now];
}

const styleNames = ["", " special", " part"];

function classesOf(column, t) {
  let names = `t ${colourOf(column, t)}${styleNames[styleOf(t)]}`;
  if (!matchesFilter(column, t)) names += " off";
  if (state.inMatch?.[t]) names += isNow(t) ? " hit now" : " hit";
  if (isSelected(t)) names += " chosen";
  if (t === state.active) names += " active";
  if (t === state.hover) names += " under";
  return names;
}

function paintLine({ cells }) {
  cells.forEach((spans, column) => {
    for (const span of spans) {
      const t = Number(span.dataset.t);
      span.className = classesOf(column, t);
      if (!column) span.setAttribute("aria-selected", isSelected(t) ? "true" : "false");
    }
  });
}

function paint() {
  for (const made of drawn.values()) paintLine(made);
}

function paintTokens(...tokens) {
  for (const t of tokens) {
    if (t === null) continue;
    const made = drawn.get(lineOf(t));
    if (made) paintLine(made);
  }
}

function show(t, where = "near") {
  const line = lineOf(t);
  const text = $("text");
  const top = lines.tops[line];
  const room = text.clientHeight;
  if (where === "top") text.scrollTop = Math.max(top - HEAD, 0);
  else if (top < text.scrollTop + ROW)
    text.scrollTop = top - (where === "middle" ? room / 3 : HEAD);
  else if (top + 2 * ROW > text.scrollTop + room) {
    text.scrollTop = where === "middle" ? top - room / 3 : top + 3 * ROW - room;
  }
  draw();
}

/** The first token in sight. */
function firstSeen() {
  const line = Math.max(below(lines.tops, $("text").scrollTop + ROW), 0);
  return Math.min(lines.starts[line], T - 1);
}

function relayOut() {
  const first = lines.starts.length ? firstSeen() : 0;
  const started = $("text").scrollTop > 0;
  layOut();
  if (started) $("text").scrollTop = Math.max(lines.tops[lineOf(first)] - ROW, 0);
  redraw();
}
