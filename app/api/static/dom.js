/* The document and JSON. Texts of the service become properties or text nodes, never HTML. */

export const $ = (selector, within = document) => within.querySelector(selector);

export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

export function drawing(viewBox, ...shapes) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  if (viewBox) svg.setAttribute("viewBox", viewBox);
  svg.setAttribute("aria-hidden", "true");
  for (const attributes of shapes) {
    const rect = document.createElementNS(svg.namespaceURI, "rect");
    for (const [name, value] of Object.entries(attributes)) rect.setAttribute(name, value);
    svg.append(rect);
  }
  return svg;
}

/* A frame around a face in a picture of this size; box: [x, y, width, height]. */
export function boxes([width, height], [x, y, w, h]) {
  const box = {x, y, width: w, height: h};
  return drawing(`0 0 ${width} ${height}`, {...box, class: "under"}, {...box, class: "box"});
}

/* JSON or text that may need scrolling. */
export function block(text, label, className = "") {
  return element("pre", {tabIndex: 0, role: "group", ariaLabel: label, className}, text);
}

/* JSON with short lists and objects on one line. */
export function pretty(value, indent = "") {
  if (value === null || typeof value !== "object") return JSON.stringify(value);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  const inner = indent + "  ";
  const parts = Object.entries(value).map(
    ([key, item]) => (open === "{" ? JSON.stringify(key) + ": " : "") + pretty(item, inner));
  const line = open + parts.join(", ") + close;
  if (indent.length + line.length < 72 && !line.includes("\n")) return line;
  return `${open}\n${inner}${parts.join(`,\n${inner}`)}\n${indent}${close}`;
}

export const isObject = value => typeof value === "object" && value !== null && !Array.isArray(value);
export const isNumbers = value => isObject(value) && Object.keys(value).length > 0
  && Object.values(value).every(item => typeof item === "number");
export const say = text => { $("#status").textContent = text.slice(0, 500); };

/* Bytes in words, as the service's own messages say them: 12.3 kB, 10.5 MB. */
export function sizeInWords(bytes) {
  const [unit, length] = [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]].find(([, one]) => bytes >= one) ?? [];
  return unit ? `${(bytes / length).toFixed(1).replace(/\.0$/, "")} ${unit}` : plural(bytes, "byte");
}

export const plural = (count, one, many = `${one}s`) => `${count.toLocaleString("en")} ${count === 1 ? one : many}`;
export const pause = seconds => new Promise(resolve => { setTimeout(resolve, 1000 * seconds); });

/* Has the browser save a text or Blob under this name. */
export function save(content, type, name) {
  const url = URL.createObjectURL(new Blob([content], {type}));
  element("a", {href: url, download: name}).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}
