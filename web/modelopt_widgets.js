// What the pack puts on nodes: chips, a report, a chart. All text goes in as text, never as HTML.
import { app } from "../../scripts/app.js";

const LINE = 16;
const LETTER = 7.3;
const MOST_LINES = 18;
const CHART = 92;
const CHIP = 22; // a row of chips, of which there is room for ROWS at least
const ROWS = 2;
const BESIDE = { chip: 20, row: 30, rows: 6, canvas: 20 }; // what is around each, on the classic canvas also around all
const FOOTER = 30; // the line below a node in Nodes 2.0
const AROUND = 180; // of a picture in Nodes 2.0: its size in words, and what rows share
const LEAST_PICTURE = 220; // what `computeSize` counts for the page's own picture
export const WIDTH = 460;

function element(tag, className, text) {
  const made = document.createElement(tag);
  made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

/** A new widget of the node around `root`. Never saved or sent, and not an entry of the side panel,
 * which would give it the panel's width on the node too. */
function widget(node, name, root, heights) {
  const options = { serialize: false, hideInPanel: true, ...heights };
  const made = node.addDOMWidget(name, "modelopt", root, options);
  made.serialize = false;
  return made;
}

function existing(node, name) {
  return node.widgets?.find((one) => one.name === name);
}

/** Height that a node's widgets ask for: more than `computeSize` where a list has several lines, and
 * in Nodes 2.0, whose widgets are higher. */
function wanted(node) {
  const widgets = node.widgets ?? [];
  const lists = widgets.filter((one) => one.type === "customtext");
  const lines = lists.map((one) => Math.min(String(one.value).split("\n").length, 10));
  const rows = LiteGraph.vueNodesMode ? 5 * widgets.length + FOOTER : 0;
  return node.computeSize()[1] + rows + lines.reduce((sum, count) => sum + 30 + 17 * count, 0);
}

/** At least `width` and what its widgets ask for. */
export function grow(node, width = 0) {
  const [needed] = node.computeSize();
  const across = Math.max(node.size[0], needed, width);
  node.setSize([across, Math.max(node.size[1], wanted(node))]);
  node.setDirtyCanvas?.(true, true);
}

/** Room for the picture at `url`, which the page puts on the node: as wide as the node. */
export function makeRoom(node, url) {
  const picture = new Image();
  picture.onload = () => {
    const [width, height] = node.size;
    const there = existing(node, "$$canvas-image-preview") ? LEAST_PICTURE : 0;
    const high = (width * picture.naturalHeight) / picture.naturalWidth;
    const around = LiteGraph.vueNodesMode ? AROUND : 0;
    node.setSize([width, Math.max(height, wanted(node) - there + high + around)]);
    node.setDirtyCanvas?.(true, true);
  };
  picture.src = url;
}

/** Takes away the line of progress that the page itself put on the node. */
export function endProgress(node) {
  const line = existing(node, "$$node-text-preview");
  if (!line) return;
  const height = line.computedHeight ?? 0;
  node.removeWidget(line);
  node.setSize([node.size[0], Math.max(node.size[1] - height, node.computeSize()[1])]);
}

/** Rows that chips of these widths take on a node as wide as it is. */
function rowsOf(node, widths) {
  let rows = 1;
  let left = node.size[0] - BESIDE.row;
  for (const width of widths) {
    if (width > left && left < node.size[0] - BESIDE.row) {
      rows += 1;
      left = node.size[0] - BESIDE.row;
    }
    left -= width;
  }
  return Math.max(rows, ROWS);
}

/** Widths of chips with these texts, pixels. */
function widthsOf(texts) {
  const context = app.canvas.ctx;
  context.save();
  context.font = "11px system-ui, sans-serif";
  const found = texts.map((text) => context.measureText(text).width + BESIDE.chip);
  context.restore();
  return found;
}

/** A place for chips. */
export function addChips(node) {
  const root = element("div", "modelopt-chips");
  const height = () =>
    CHIP * rowsOf(node, node.modeloptChips ?? []) +
    (LiteGraph.vueNodesMode ? BESIDE.rows : BESIDE.canvas);
  widget(node, "modelopt_chips", root, { getMinHeight: height, getMaxHeight: height });
}

/** Coloured words: [{text, tone, why}], in their place. */
export function showChips(node, chips) {
  const root = existing(node, "modelopt_chips").element;
  root.replaceChildren(
    ...chips.map(({ text, tone, why }) => {
      const chip = element("span", "modelopt-chip", text);
      chip.dataset.tone = tone;
      if (why) chip.title = why;
      return chip;
    }),
  );
  node.modeloptChips = widthsOf(chips.map(({ text }) => text));
  const rows = rowsOf(node, node.modeloptChips);
  root.style.setProperty("--modelopt-chips", `${CHIP * rows + BESIDE.rows}px`);
  if (rows > ROWS) grow(node);
}

/** Lines of a text as wide as a report is: fixed-width letters of 7.3 pixels. */
function wrapped(text) {
  const letters = Math.floor((WIDTH - 40) / LETTER);
  return text.split("\n").reduce((sum, line) => sum + Math.max(1, Math.ceil(line.length / letters)), 0);
}

/** Says of what the node shows of a run whether it is of an earlier one. */
export function markEarlier(node, earlier) {
  for (const name of ["modelopt_report", "modelopt_chart"]) {
    const root = existing(node, name)?.element;
    if (!root) continue;
    root.classList.toggle("modelopt-earlier", earlier);
    root.title = earlier ? "of an earlier run" : "";
  }
}

/** Read-only text that scrolls and can be copied. */
export function showReport(node, text) {
  let found = existing(node, "modelopt_report");
  if (!found) {
    const root = element("textarea", "modelopt-report");
    root.readOnly = true;
    root.spellcheck = false;
    const height = () => LINE * Math.min(wrapped(root.value), MOST_LINES) + 16;
    found = widget(node, "modelopt_report", root, {
      getMinHeight: height,
      getMaxHeight: () => (node.imgs?.length ? height() : 100_000), // what is left is the picture's
    });
  }
  found.element.value = text;
  found.element.style.setProperty("--modelopt-height", `${found.options.getMinHeight()}px`);
  grow(node, WIDTH);
}

/** Bars of the UNet's blocks: [[name, bits a weight, MB]]. A bar's area is its part of the file. */
export function showChart(node, blocks) {
  let found = existing(node, "modelopt_chart");
  if (!found) {
    const root = element("div", "modelopt-chart");
    const heights = { getMinHeight: () => CHART, getMaxHeight: () => CHART };
    found = widget(node, "modelopt_chart", root, heights);
  }
  const bars = element("div", "modelopt-bars");
  for (const [name, bits, mb] of blocks) {
    const bar = element("div", "modelopt-bar");
    bar.style.flex = `${mb / bits} 1 2px`;
    bar.style.height = `${(100 * Math.min(bits, 16)) / 16}%`;
    bar.dataset.bits = bits < 6.5 ? "4" : bits < 12 ? "8" : "16";
    bar.title = `${name}: ${bits.toFixed(2)} bits a weight, ${mb.toFixed(1)} MB`;
    bars.append(bar);
  }
  const total = blocks.reduce((sum, [, , mb]) => sum + mb, 0);
  const weights = blocks.reduce((sum, [, bits, mb]) => sum + mb / bits, 0);
  const legend = element("div", "modelopt-legend");
  legend.append(
    element("span", "", "bits by block, first to last (lines: 4, 8, 12, 16)"),
    element("span", "", `all: ${(total / weights).toFixed(1)} bits, ${total.toFixed(1)} MB`),
  );
  found.element.replaceChildren(bars, legend);
  grow(node, WIDTH);
}
