// Constructors of SVG and HTML elements.

function svg(name, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function html(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const line = (kind, x1, y1, x2, y2) => svg("line", { class: kind, x1, y1, x2, y2 });

const path = (kind, points) =>
  svg("path", { class: kind, d: "M" + points.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join("L") });

// Entry of a legend: a small drawing and its meaning.
const key = (text, ...drawn) =>
  html("span", {}, svg("svg", { viewBox: "0 0 24 12", "aria-hidden": "true" }, ...drawn), text);
