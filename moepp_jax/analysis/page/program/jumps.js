// Sources and documents.

let documentsOf = -1; // the source whose documents are listed

function makeJumps() {
  const there = [...new Set(segments.map(([, source]) => source))];
  $("source").append(
    ...there.map((source) => make("option", { value: source }, sources[source]?.[0] ?? "text")),
  );
}

function listDocuments(source) {
  if (source === documentsOf) return;
  documentsOf = source;
  const options = segments.flatMap(([, of, document, position], number) =>
    of === source
      ? [
          make(
            "option",
            { value: number },
            `document ${grouped(document)}${position ? `, ${grouped(position)}` : ""}`,
          ),
        ]
      : [],
  );
  $("document").replaceChildren(...options);
}

/** The two lists say where the token is. */
function tellPlace(t) {
  const number = below(segmentStarts, t);
  const source = segments[number][1];
  $("source").value = source;
  listDocuments(source);
  $("document").value = number;
}

function goTo(segment) {
  const t = segments[segment][0];
  activate(t);
  show(t, "top");
}
