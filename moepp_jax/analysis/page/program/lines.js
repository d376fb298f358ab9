// Lines: where each token stands.

const lines = { starts: [], ends: [], tops: [], heads: [], height: 0 };
let widths = null; // of each string, once it is measured

function measure() {
  const probe = make("span", { class: "t" });
  const odd = make("span", { class: "t special" });
  $("sheet").append(probe, odd);
  const context = document.createElement("canvas").getContext("2d");
  const fonts = [probe, odd].map((span) => {
    const style = getComputedStyle(span);
    const around = parseFloat(style.paddingLeft) * 2 + parseFloat(style.marginRight);
    return { font: `${style.fontWeight} ${style.fontSize} ${style.fontFamily}`, around };
  });
  widths = new Float32Array(strings.length);
  for (const style of [TEXT, SPECIAL]) {
    const { font, around } = fonts[style];
    context.font = font;
    strings.forEach(([text, is], n) => {
      if ((is === SPECIAL) === (style === SPECIAL)) {
        widths[n] = context.measureText(text).width + around;
      }
    });
  }
  probe.remove();
  odd.remove();
}

function columnWidth() {
  const count = columnsOf().length;
  return ($("sheet").clientWidth - GAP * (count - 1)) / count;
}

/** Breaks every segment into lines of the column's width. */
function layOut() {
  const width = columnWidth() - 2; // measuring is to a fraction of a pixel
  Object.assign(lines, { starts: [], ends: [], tops: [], heads: [], height: 0 });
  const add = (start, end, segment) => {
    lines.starts.push(start);
    lines.ends.push(end);
    lines.tops.push(lines.height);
    lines.heads.push(segment);
    lines.height += segment === null ? ROW : HEAD;
  };
  segments.forEach(([start], number) => {
    const end = number + 1 < segments.length ? segments[number + 1][0] : T;
    add(start, start, number);
    layOutSegment(start, end, width, add);
  });
  $("sheet").style.height = `${lines.height}px`;
}

function layOutSegment(start, end, width, add) {
  let first = start;
  let used = 0;
  for (let t = start; t < end; t++) {
    const own = widths[arrays.text[t]];
    if (used + own > width && t > first) {
      add(first, t, null);
      first = t;
      used = 0;
    }
    used += own;
    for (let left = breaksOf(t); left > 0; left--) {
      add(first, t + 1, null); // more breaks are empty lines
      first = t + 1;
      used = 0;
    }
  }
  if (first < end) add(first, end, null);
}

/** The line with a token: what starts at the same token, a head or an empty line, is before it. */
const lineOf = (t) => below(lines.starts, t);
