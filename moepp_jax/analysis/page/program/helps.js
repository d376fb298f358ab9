/* Letters: t is a token, j a MoE layer of a model, k a choice; T, J, K are their counts. */

const TEXT = 0;
const SPECIAL = 1;
const UNUSED = 4;
const DROPPED = 5; // after the four kinds of experts
const BINS = 25; // colours of a scale; odd, so that a difference of zero has one
const HEAD = 60;
const ROW = 30; // heights, as in the styles
const GAP = 40; // between two columns
const PRINTED = 2000; // tokens

const $ = (id) => document.getElementById(id);

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") element.className = value;
    else if (name === "style") element.style.cssText = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const grouped = (value) => value.toLocaleString("en");
const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)}%`;

/** The last index whose value is not above `value`, in an array that rises. */
function below(values, value) {
  let low = 0;
  let high = values.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] <= value) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}
