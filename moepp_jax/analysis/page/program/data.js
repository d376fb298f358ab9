// What is in the page.

async function unpack(base64) {
  const text = atob(base64);
  const packed = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) packed[i] = text.charCodeAt(i);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const block = await new Response(stream).arrayBuffer();
  const size = new DataView(block).getUint32(0, true);
  const head = JSON.parse(new TextDecoder().decode(new Uint8Array(block, 4, size)));
  const types = { 1: Uint8Array, 2: Uint16Array, 4: Uint32Array };
  const arrays = {};
  for (const [name, width, at, length] of head.arrays) {
    arrays[name] = new types[width](block, 4 + size + at, length);
  }
  return { head, arrays };
}

/** One record: how each token was routed. */
class Model {
  constructor(about, T, choices, gates, losses) {
    Object.assign(this, about, { T, choices, steps: gates, losses });
    this.J = about.layers.length;
    this.K = about.most;
    this.starts = about.counts.reduce((all, count) => [...all, all.at(-1) + count], [0]);
    this.N = this.starts[4];
    this.kindOf = Uint8Array.from({ length: 2 * this.N + 1 }, (_, choice) => this.kind(choice));
    this.countFfn();
  }

  /** Of a choice: N is unused, and N + 1 + expert was dropped. */
  kind(choice) {
    if (choice > this.N) return DROPPED;
    return choice === this.N ? UNUSED : below(this.starts, choice);
  }

  plane(j, k) {
    const start = (j * this.K + k) * this.T;
    return this.choices.subarray(start, start + this.T);
  }

  gate(j, k, t) {
    const [low, high] = this.gates;
    return low + (this.steps[(j * this.K + k) * this.T + t] * (high - low)) / 255;
  }

  countFfn() {
    this.ffn = Array.from({ length: this.J }, () => new Uint8Array(this.T));
    this.ffnMean = new Float32Array(this.T);
    for (let j = 0; j < this.J; j++) {
      const counts = this.ffn[j];
      for (let k = 0; k < this.K; k++) {
        const plane = this.plane(j, k);
        for (let t = 0; t < this.T; t++) if (plane[t] < this.counts[0]) counts[t]++;
      }
      for (let t = 0; t < this.T; t++) this.ffnMean[t] += counts[t] / this.J;
    }
  }

  /** The MoE layers looked at: all, or one by its number in the model, if it is there. */
  at(layer) {
    if (layer === null) return [...this.layers.keys()];
    const j = this.layers.indexOf(layer);
    return j < 0 ? [] : [j];
  }

  /** FFN experts of each token; null where the model has no such MoE layer. */
  level(layer) {
    return layer === null ? this.ffnMean : (this.ffn[this.layers.indexOf(layer)] ?? null);
  }

  /** Choices that a filter is for, as a table. */
  wantedBy({ kind, index }) {
    return this.kindOf.map((is, choice) =>
      is === kind && (index === null || choice === this.starts[kind] + index) ? 1 : 0,
    );
  }

  /** Which tokens used what the filter is for. */
  users(filter, layer) {
    const wanted = this.wantedBy(filter);
    const users = new Uint8Array(this.T);
    for (const j of this.at(layer)) {
      for (let k = 0; k < this.K; k++) {
        const plane = this.plane(j, k);
        for (let t = 0; t < this.T; t++) users[t] |= wanted[plane[t]];
      }
    }
    return users;
  }

  /** Share of tokens with each choice, over the layers; of those in `some`, or all. */
  load(layer, some = null) {
    const at = this.at(layer);
    const counts = new Float64Array(2 * this.N + 1);
    for (const j of at) {
      for (let k = 0; k < this.K; k++) {
        const plane = this.plane(j, k);
        if (some) for (const t of some) counts[plane[t]]++;
        else for (let t = 0; t < this.T; t++) counts[plane[t]]++;
      }
    }
    const tokens = (some ? some.length : this.T) * at.length;
    return tokens ? counts.map((count) => count / tokens) : counts;
  }

  /** Experts a token of each kind, by a load. */
  ofKinds(load) {
    const sums = new Float64Array(6);
    load.forEach((share, choice) => (sums[this.kindOf[choice]] += share));
    return sums;
  }

  loss(t) {
    return this.losses[t] === noLoss ? null : this.losses[t] / 1000;
  }

  expertName(expert) {
    const kind = this.kindOf[expert];
    const number = this.counts[kind] > 1 ? ` ${expert - this.starts[kind] + 1}` : "";
    return kinds[kind] + number;
  }
}

const { head, arrays } = await unpack($("data").textContent);
const { kinds, noLoss, strings, segments, sources, tokens: T } = head;
const models = head.models.map(
  (about, m) => new Model(about, T, arrays[`choice${m}`], arrays[`gate${m}`], arrays[`loss${m}`]),
);
const layers = [...new Set(models.flatMap((model) => model.layers))].sort((a, b) => a - b);
const segmentStarts = segments.map(([start]) => start);

const shownOf = (t) => strings[arrays.text[t]][0];
const styleOf = (t) => strings[arrays.text[t]][1];
const breaksOf = (t) => strings[arrays.text[t]][2];
const rawOf = (t) => head.raw[arrays.text[t]] ?? shownOf(t);
const segmentOf = (t) => segments[below(segmentStarts, t)];
