// Shows on the pack's nodes what they report, and before the run how a choice would run here.
import { app } from "../../scripts/app.js";
import { followWidgets, hasBadge } from "./modelopt_badge.js";
import { endProgress, showChart, showReport, WIDTH } from "./modelopt_widgets.js";

const PREFIX = "ModelOpt";

function addStyle() {
  const link = document.createElement("link");
  link.rel = "stylesheet";
  link.href = new URL("./modelopt.css", import.meta.url).href;
  document.head.append(link);
}

function output(node, message) {
  endProgress(node);
  const text = message?.text;
  if (text?.length) showReport(node, Array.isArray(text) ? text.join("") : String(text));
  if (message?.modelopt_blocks?.length) showChart(node, message.modelopt_blocks);
}

/** Room for the title and for lists of several lines, where the node is new. */
function fit(node) {
  const texts = (node.widgets ?? []).filter((widget) => widget.type === "customtext");
  const lines = texts.map((widget) => Math.min(String(widget.value).split("\n").length, 10));
  const rows = LiteGraph.vueNodesMode ? 5 * (node.widgets ?? []).length : 0; // higher in Nodes 2.0
  const more = rows + lines.reduce((sum, count) => sum + 30 + 17 * count, 0); // px
  const [width, height] = node.computeSize();
  const wide = texts.length ? WIDTH : Math.max(width, 10 * node.title.length + 60);
  node.setSize([Math.max(node.size[0], wide), Math.max(node.size[1], height + more)]);
}

app.registerExtension({
  name: "ModelOpt",
  init: addStyle,
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith(PREFIX)) return;
    const onExecuted = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (message) {
      onExecuted?.apply(this, arguments);
      output(this, message);
    };
  },
  nodeCreated(node) {
    const id = node.comfyClass ?? "";
    if (!id.startsWith(PREFIX)) return;
    if (hasBadge(id)) followWidgets(node, id);
    fit(node);
  },
});
