// Shows on the pack's nodes what they report, and before the run how a choice would run here.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { askAgain, followWidgets, hasBadge } from "./modelopt_badge.js";
import { failed, keepQueued, shows } from "./modelopt_earlier.js";
import { endProgress, grow, makeRoom, showChart, showReport, WIDTH } from "./modelopt_widgets.js";

const PREFIX = "ModelOpt";

function addStyle() {
  const link = document.createElement("link");
  link.rel = "stylesheet";
  link.href = new URL("./modelopt.css", import.meta.url).href;
  document.head.append(link);
}

/** fresh: of a run that ended now. */
function output(node, message, fresh) {
  endProgress(node);
  const found = message?.text;
  const text = Array.isArray(found) ? found.join("") : String(found ?? "");
  if (text) showReport(node, text);
  if (message?.modelopt_blocks?.length) showChart(node, message.modelopt_blocks);
  if (text) shows(node, text, fresh);
  const [picture] = message?.images ?? [];
  if (picture) makeRoom(node, api.apiURL(`/view?${new URLSearchParams(picture)}`));
}

/** Room for the title and for lists of several lines, where the node is new. */
function fit(node) {
  const lists = (node.widgets ?? []).some((widget) => widget.type === "customtext");
  grow(node, lists ? WIDTH : 10 * node.title.length + 60);
}

/** Shows again what a node showed before its workflow's tab was left: the page brings the outputs back
 * a moment after the nodes. */
function recall(node, tries = 10) {
  const inside = node.graph?.isRootGraph === false; // a subgraph's nodes have numbers of their own
  const found = app.nodeOutputs?.[inside ? `${node.graph.id}:${node.id}` : node.id];
  if (found) output(node, found, false);
  else if (tries && node.graph) setTimeout(recall, 100, node, tries - 1);
}

const root = () => app.rootGraph ?? app.graph;

/** A node that failed shows what an earlier run gave, and a line of progress that is over. */
function onFailure({ detail }) {
  const path = String(detail?.node_id ?? "").split(":"); // through subgraphs
  const last = path.pop();
  const graph = path.reduce((found, id) => found?.getNodeById(id)?.subgraph, root());
  const node = graph?.getNodeById(last);
  // another workflow's node may have its number
  if (!node?.comfyClass?.startsWith(PREFIX) || node.comfyClass !== detail.node_type) return;
  endProgress(node);
  failed(node);
}

app.registerExtension({
  name: "ModelOpt",
  init() {
    addStyle();
    api.addEventListener("promptQueued", () => keepQueued(root()));
    api.addEventListener("execution_error", onFailure);
    api.addEventListener("execution_interrupted", onFailure);
  },
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith(PREFIX)) return;
    const onExecuted = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (message) {
      onExecuted?.apply(this, arguments);
      output(this, message, true);
      this.modeloptAskAgain?.(); // it runs, or could be read, now as it did not before
    };
  },
  // R was pressed: files may have come or gone
  refreshComboInNodes() {
    askAgain(root());
  },
  loadedGraphNode(node) {
    if (node.comfyClass?.startsWith(PREFIX)) recall(node);
  },
  nodeCreated(node) {
    const id = node.comfyClass ?? "";
    if (!id.startsWith(PREFIX)) return;
    if (hasBadge(id)) followWidgets(node, id);
    fit(node);
  },
});
