// Shows on a node the text it reports: the plan, the report of Quantize, the info of Load and Info, the comparison, the benchmark, the GPU's table, paths.
import { app } from "../../scripts/app.js";

const NODES = new Set([
  "ModelOptPlan",
  "ModelOptQuantize",
  "ModelOptAutoQuantize",
  "ModelOptLoadUNet",
  "ModelOptImport",
  "ModelOptExport",
  "ModelOptModelInfo",
  "ModelOptCompare",
  "ModelOptBenchmark",
  "ModelOptGPUInfo",
  "ModelOptSaveUNet",
  "ModelOptSaveCalibration",
]);
const NAME = "modelopt_text";
const LINE = 16;
const MOST_LINES = 16;

function addText(node) {
  const element = document.createElement("textarea");
  element.className = "comfy-multiline-input";
  element.readOnly = true;
  element.rows = 1;
  const widget = node.addDOMWidget(NAME, "customtext", element, {
    getValue: () => element.value,
    setValue: (value) => {
      element.value = value ?? "";
    },
    getMinHeight: () => LINE * Math.min(element.value.split("\n").length + 1, MOST_LINES),
    serialize: false,
  });
  widget.serialize = false; // shown only: not saved in the workflow, not sent with the prompt
  return widget;
}

function show(node, text) {
  const widget = node.widgets?.find((w) => w.name === NAME) ?? addText(node);
  widget.value = text;
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width, 440), Math.max(node.size[1], height)]);
  node.setDirtyCanvas?.(true, true);
}

app.registerExtension({
  name: "ModelOpt.Text",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!NODES.has(nodeData.name)) return;
    const onExecuted = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      const text = output?.text;
      if (text?.length) show(this, Array.isArray(text) ? text.join("") : String(text));
    };
  },
});
