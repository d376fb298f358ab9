// Light and dark, print.

const isDark = () => {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
};

function nameTheme() {
  $("theme").textContent = isDark() ? "Light theme" : "Dark theme";
}

function toggleTheme() {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  nameTheme();
}

/** Lines break by themselves on paper; the text is printed from the first token in sight. */
function fillPrint() {
  const first = firstSeen();
  const last = Math.min(first + PRINTED, T);
  const parts = [];
  for (let number = below(segmentStarts, first); number < segments.length; number++) {
    const from = Math.max(segments[number][0], first);
    if (from >= last) break;
    const to = Math.min(segments[number + 1]?.[0] ?? T, last);
    parts.push(make("h3", {}, describeSegment(number).join(", ")), printedSegment(from, to));
  }
  $("printed").replaceChildren(...parts);
}

function printedSegment(from, to) {
  const columns = columnsOf();
  return make(
    "div",
    { class: columns.length > 1 ? "two" : "" },
    ...columns.map((_, column) => {
      const cell = make("div");
      for (let t = from; t < to; t++) {
        cell.append(make("span", { class: classesOf(column, t) }, shownOf(t)));
        for (let left = breaksOf(t); left > 0; left--) cell.append(make("br"));
      }
      return cell;
    }),
  );
}
