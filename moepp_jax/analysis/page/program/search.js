// Search.

let searched = null; // the text in lower case, and where each token starts in it

function searchable() {
  const parts = [];
  const starts = new Uint32Array(T + 1);
  let at = 0;
  for (let t = 0; t < T; t++) {
    // Nothing is found across documents: no one can type what is between them.
    const between = t && segmentOf(t)[2] !== segmentOf(t - 1)[2] ? "\0" : "";
    const text = rawOf(t).toLowerCase();
    starts[t] = at + between.length;
    at += between.length + text.length;
    parts.push(between, text);
  }
  starts[T] = at;
  return { text: parts.join(""), starts };
}

function search(query) {
  state.matches = { starts: [], ends: [], now: -1 };
  state.inMatch = null;
  const wanted = query.toLowerCase();
  if (wanted) {
    searched ??= searchable();
    state.inMatch = new Uint8Array(T);
    for (
      let at = searched.text.indexOf(wanted);
      at >= 0;
      at = searched.text.indexOf(wanted, at + wanted.length)
    ) {
      addMatch(at, at + wanted.length);
    }
  }
  goToMatch(below(state.matches.starts, firstSeen() - 1) + 1);
  drawLoadsSoon();
}

function addMatch(from, to) {
  const start = below(searched.starts, from);
  const end = below(searched.starts, to - 1) + 1;
  state.matches.starts.push(start);
  state.matches.ends.push(end);
  state.inMatch.fill(1, start, end);
}

function goToMatch(number) {
  const { starts } = state.matches;
  const count = starts.length;
  state.matches.now = count ? (number + count) % count : -1;
  const query = $("query").value;
  $("found").textContent = !query
    ? ""
    : count
      ? `${grouped(state.matches.now + 1)} of ${grouped(count)}`
      : "none";
  for (const id of ["before", "next"]) $(id).disabled = !count;
  if (count) {
    show(starts[state.matches.now], "middle");
    settle(starts[state.matches.now]);
  }
  paint();
}
