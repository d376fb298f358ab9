// Keys.

/** The token nearest to this one, some lines above or below. */
function onLine(t, by) {
  const step = Math.sign(by);
  let line = lineOf(t);
  let left = Math.abs(by);
  for (let next = line + step; next >= 0 && next < lines.starts.length && left; next += step) {
    if (lines.ends[next] > lines.starts[next]) {
      line = next;
      left--;
    }
  }
  return nearestAcross(t, line);
}

/** By where it stands in its line, measured as the lines were. */
function nearestAcross(t, line) {
  const middle = (of, token) => {
    let x = 0;
    for (let i = lines.starts[of]; i < token; i++) x += widths[arrays.text[i]];
    return x + widths[arrays.text[token]] / 2;
  };
  const wanted = middle(lineOf(t), t);
  let best = null;
  let least = Infinity;
  for (let i = lines.starts[line]; i < lines.ends[line]; i++) {
    const away = Math.abs(middle(line, i) - wanted);
    if (away < least) [best, least] = [i, away];
  }
  return best;
}

const pageOf = () => Math.max(Math.floor($("text").clientHeight / ROW) - 2, 1);

const MOVES = {
  ArrowLeft: (t) => t - 1,
  ArrowRight: (t) => t + 1,
  ArrowUp: (t) => onLine(t, -1),
  ArrowDown: (t) => onLine(t, 1),
  PageUp: (t) => onLine(t, -pageOf()),
  PageDown: (t) => onLine(t, pageOf()),
  Home: (t, all) => (all ? 0 : lines.starts[lineOf(t)]),
  End: (t, all) => (all ? T - 1 : lines.ends[lineOf(t)] - 1),
};

function moveByKey(event) {
  const move = MOVES[event.key];
  if (!move || event.altKey) return;
  event.preventDefault();
  hover(null);
  activate(clamp(move(state.active, event.ctrlKey || event.metaKey), 0, T - 1), {
    extend: event.shiftKey,
  });
}

function clear() {
  state.selected = null;
  $("query").value = "";
  search("");
  filterBy(null);
}

function anywhere(event) {
  // Some keyboards write brackets with AltGr, which Windows tells as Ctrl and Alt.
  const isCommand = (event.ctrlKey || event.metaKey) && !event.getModifierState("AltGraph");
  if (isCommand || event.target.matches("#query, select")) return;
  if (event.key === "[") stepLayer(-1);
  else if (event.key === "]") stepLayer(1);
  else if (event.key === "/") {
    event.preventDefault();
    $("query").focus();
    $("query").select();
  } else if (event.key === "Escape") clear();
}

function copy(event) {
  if (!state.selected || document.activeElement?.id !== "text") return;
  const [from, to] = [Math.min(...state.selected), Math.max(...state.selected)];
  let text = "";
  for (let t = from; t <= to; t++) text += rawOf(t);
  event.clipboardData.setData("text/plain", text);
  event.preventDefault();
}
