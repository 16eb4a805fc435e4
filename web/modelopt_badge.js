// Asks the server how the file or the formats chosen on a node would run here, and shows it.
import { api } from "../../scripts/api.js";
import { compare, follow, nodesOf } from "./modelopt_earlier.js";
import { addChips, grow, showChips } from "./modelopt_widgets.js";

const DELAY = 150; // ms: a format's options come a moment after the format

function value(node, name) {
  return node.widgets?.find((widget) => widget.name === name)?.value;
}

function ofFormat(node) {
  const format = value(node, "format");
  const e5m2 = format === "fp8" && value(node, "format.weights") === "e5m2";
  return { formats: format ? [e5m2 ? "fp8_e5m2" : format] : [], layers: value(node, "layers") };
}

const ASKED = {
  ModelOptLoadUNet: (node) => ({ unet: value(node, "unet_name") }),
  ModelOptQuantize: ofFormat,
  ModelOptPlan: ofFormat,
  ModelOptAutoQuantize: (node) => ({
    formats: node.widgets
      .filter((widget) => widget.value === true && widget.name !== "sixteen_bits")
      .map((widget) => widget.name),
    layers: value(node, "layers"),
  }),
};

function query({ unet, formats, layers }) {
  const found = new URLSearchParams();
  if (unet) found.append("unet", unet);
  for (const format of formats ?? []) found.append("format", format);
  if (formats?.length) found.append("layers", layers ?? "");
  return found.toString();
}

async function ask(asked) {
  if (!asked) return { chips: [] };
  const answer = await api.fetchApi(`/modelopt/badge?${asked}`);
  if (!answer.ok) return { chips: [] };
  const found = await answer.json();
  return found.error ? { chips: [{ text: "cannot be read", tone: "bad", why: found.error }] } : found;
}

/** The workflow keeps how the file was made, for whoever opens it without the file. */
function keepMadeBy(node, text) {
  const widget = node.widgets.find((one) => one.name === "made_by");
  if (widget) widget.value = text;
}

export const hasBadge = (id) => id in ASKED;

/** Asks again what files and formats are, on all nodes of a graph and of the subgraphs in it. */
export function askAgain(root) {
  for (const node of nodesOf(root)) node.modeloptAskAgain?.();
}

/** Keeps the chips of a node, and the mark on its report, in step with its widgets. */
export function followWidgets(node, id) {
  addChips(node);
  follow(node);
  const known = new WeakSet();
  let chosen = false; // the user has chosen something since
  let timer;
  let shown;
  let stale = false; // the answer may be another by now
  let latest = 0; // number of the last question: an older one's answer comes too late
  const makers = new Map(); // file -> how it was made, for whoever has it not
  const refresh = async () => {
    watch(); // a chosen format brings widgets of its own
    compare(node);
    if (chosen) grow(node); // the page made the node as small as it goes
    chosen = false;
    const asked = query(ASKED[id](node));
    if (asked === shown && !stale) return;
    stale = false;
    shown = asked;
    const turn = ++latest;
    const file = value(node, "unet_name"); // other nodes have none
    const found = await ask(asked);
    if (turn !== latest) return;
    if (found.made_by !== undefined) makers.set(file, found.made_by);
    keepMadeBy(node, makers.get(file) ?? "");
    showChips(node, found.chips);
  };
  const later = () => {
    clearTimeout(timer);
    timer = setTimeout(refresh, DELAY);
  };
  node.modeloptAskAgain = () => {
    stale = true;
    later();
  };
  const watch = () => {
    for (const widget of node.widgets ?? []) {
      if (known.has(widget) || widget.name.startsWith("modelopt_")) continue;
      known.add(widget);
      const callback = widget.callback;
      widget.callback = function () {
        const answer = callback?.apply(this, arguments);
        chosen = true;
        later();
        return answer;
      };
    }
  };
  const onConfigure = node.onConfigure;
  node.onConfigure = function () {
    onConfigure?.apply(this, arguments);
    makers.set(value(node, "unet_name"), value(node, "made_by"));
    chosen = false; // the workflow has, and has the node's size
    later();
  };
  watch();
  later();
}
