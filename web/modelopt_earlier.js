// Whether a report that a node shows is of what the node is set to now.
import { markEarlier } from "./modelopt_widgets.js";

const FAILED = "the node failed since";
const madeWith = new Map(); // text of a report -> the values that it was made with
const queued = new WeakMap(); // node -> its values when it was queued last
const followed = new WeakSet(); // nodes whose values are compared

/** What the user set on a node, as text. */
function values(node) {
  const own = (node.widgets ?? []).filter(
    ({ name }) => name !== "made_by" && !name.startsWith("modelopt_") && !name.startsWith("$$"),
  );
  return JSON.stringify(own.map(({ name, value }) => [name, value]));
}

/** The nodes of a graph and of the subgraphs in it. */
export function* nodesOf(root) {
  for (const graph of [root, ...(root?.subgraphs?.values() ?? [])]) yield* graph?.nodes ?? [];
}

/** From now on the node's report is looked at when the node is set to something else. */
export function follow(node) {
  followed.add(node);
}

/** Keeps what all nodes of a graph are set to: they run with that, whatever is set meanwhile. */
export function keepQueued(root) {
  for (const node of nodesOf(root)) if (followed.has(node)) queued.set(node, values(node));
}

/** Marks the node's report, or takes the mark away. */
export function compare(node) {
  const made = madeWith.get(node.modeloptReport);
  if (made === undefined) return;
  markEarlier(node, made === FAILED || (followed.has(node) && made !== values(node)));
}

/** The node shows a report. fresh: of the run that ended now, not one that is shown again. */
export function shows(node, text, fresh) {
  node.modeloptReport = text;
  if (fresh || !madeWith.has(text)) madeWith.set(text, (fresh && queued.get(node)) || values(node));
  compare(node);
}

/** The node failed: what it shows is of a run before. */
export function failed(node) {
  if (madeWith.has(node.modeloptReport)) madeWith.set(node.modeloptReport, FAILED);
  compare(node);
}
