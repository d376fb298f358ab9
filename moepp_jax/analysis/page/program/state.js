// What is chosen.

const state = {
  layer: null, // number in the model, or null for the mean of all
  difference: false,
  filter: null, // { kind, index }
  masks: null, // of the filter, one a model
  matches: { starts: [], ends: [], now: -1 },
  inMatch: null,
  selected: null, // [anchor, end], both of them in it
  active: 0,
  hover: null,
};

const columnsOf = () => (state.difference ? [null] : models);
