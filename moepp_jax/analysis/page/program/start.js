// Start.

function watchControls() {
  $("layer").max = layers.length;
  $("layer").addEventListener("input", () => setLayer(Number($("layer").value)));
  $("layer-back").addEventListener("click", () => stepLayer(-1));
  $("layer-on").addEventListener("click", () => stepLayer(1));
  $("theme").addEventListener("click", toggleTheme);
  $("kinds").addEventListener("change", ({ target }) =>
    filterBy(target.value === "" ? null : { kind: Number(target.value), index: null }),
  );
  $("expert").addEventListener("change", ({ target }) => {
    const [kind, index] = target.value.split(".").map(Number);
    filterBy(target.value ? { kind, index } : null);
  });
  $("mode").addEventListener("change", ({ target }) => {
    state.difference = target.value === "difference";
    updateColours();
    drawColumns();
    relayOut();
  });
  $("source").addEventListener("change", ({ target }) =>
    goTo(segments.findIndex(([, source]) => source === Number(target.value))),
  );
  $("document").addEventListener("change", ({ target }) => goTo(Number(target.value)));
}

function watchSearch() {
  $("query").addEventListener("input", ({ target }) => search(target.value));
  $("query").addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.preventDefault();
      event.stopPropagation();
      $("query").value = "";
      search("");
    } else if (event.key === "Enter") {
      event.preventDefault();
      goToMatch(state.matches.now + (event.shiftKey ? -1 : 1));
    }
  });
  $("search").addEventListener("submit", (event) => {
    event.preventDefault();
    goToMatch(state.matches.now + 1);
  });
  $("before").addEventListener("click", () => goToMatch(state.matches.now - 1));
}

function watchPage() {
  $("text").addEventListener("scroll", drawSoon, { passive: true });
  $("text").addEventListener("keydown", moveByKey);
  document.addEventListener("keydown", anywhere);
  document.addEventListener("copy", copy);
  addEventListener("beforeprint", fillPrint);
  addEventListener("afterprint", () => $("printed").replaceChildren());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", nameTheme);
  let width = $("sheet").clientWidth;
  new ResizeObserver(() => {
    if ($("sheet").clientWidth !== width) relayOut();
    else draw();
    width = $("sheet").clientWidth;
  }).observe($("text"));
}

function start() {
  if (models.length > 1) {
    $("mode").hidden = false;
    document.documentElement.style.setProperty("--side", "468px");
  }
  styleScales();
  nameTheme();
  drawAbout();
  drawColumns();
  makeFilters();
  makeJumps();
  drawProfile();
  measure();
  layOut();
  watchControls();
  watchMouse();
  watchSearch();
  watchPage();
  goToMatch(0);
  setLayer(0);
  draw();
  settle(0);
  drawLoads();
  document.body.dataset.ready = "";
  performance.mark("ready");
}

start();
