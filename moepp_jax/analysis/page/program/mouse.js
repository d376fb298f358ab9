// Mouse.

const tokenAt = (target) => {
  const t = target.closest?.(".t")?.dataset.t;
  return t === undefined ? null : Number(t);
};

function watchMouse() {
  const text = $("text");
  let anchor = null;
  text.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    const t = tokenAt(event.target);
    if (t === null) return;
    anchor = t;
    activate(t, { extend: event.shiftKey, scroll: false });
  });
  text.addEventListener("pointermove", (event) => {
    const t = tokenAt(document.elementFromPoint(event.clientX, event.clientY) ?? text);
    if (anchor === null || !(event.buttons & 1)) return hover(t);
    scrollAtEdge(event.clientY);
    if (t === null || (t === state.active && !state.selected)) return;
    state.hover = null;
    state.selected ??= [anchor, anchor];
    if (t !== state.active) activate(t, { extend: true, scroll: false });
  });
  text.addEventListener("pointerleave", () => hover(null));
  for (const end of ["pointerup", "pointercancel"]) addEventListener(end, () => (anchor = null));
}

function scrollAtEdge(y) {
  const { top, bottom } = $("text").getBoundingClientRect();
  if (y < top + 12) $("text").scrollBy(0, -ROW);
  if (y > bottom - 12) $("text").scrollBy(0, ROW);
}
