// Loss along a line and over a plane.

// Ratio of largest to smallest loss above which the scale is logarithmic.
const WIDE = 50;
const LEVELS = 15;
// Shades from dark to light, so that the order of values is visible without colour.
const SHADES = ["#0f2b46", "#1f4e79", "#4a86ae", "#8fc0c9", "#cfe0cf", "#f6efd9"];

function lineChart(figure, { line: landscape }) {
  const points = landscape.x.map((x, i) => ({ x, loss: landscape.values[i] })).filter(point => point.loss !== null);
  if (!points.length) return;
  const losses = points.map(point => point.loss);
  const scale = scaled(losses);

  chart(figure, {
    full: { x: ends(landscape.x), y: [0, 1] },
    axes: ["x"],
    labels: { x: "along eigenvector 1", y: "loss" },
    isLog: scale.isLog,
    shape: 0.72,
    range: ({ x }) => scale.around(losses.slice(...span(points.map(point => point.x), x))),
    paint: frame => [
      path("curve", points.map(point => [frame.x(point.x), frame.y(point.loss)])),
      ...points.map(point =>
        svg("circle", { class: point.x === 0 ? "head" : "point", cx: frame.x(point.x), cy: frame.y(point.loss), r: point.x === 0 ? 4.5 : 2.5 }),
      ),
    ],
    find(frame, at) {
      const point = nearest(points, other => other.x - at.x);
      return { x: point.x, y: point.loss, text: `at ${number(point.x)}\nloss ${number(point.loss, 5)}` };
    },
    caption: [key("the parameters", svg("circle", { class: "head", cx: 12, cy: 6, r: 4.5 }))],
  });
}

function planeChart(figure, { plane: landscape }) {
  const known = rows => rows.flat().filter(value => value !== null);
  if (!known(landscape.values).length) return;
  const limits = [html("span"), html("span")];

  chart(figure, {
    full: { x: ends(landscape.x), y: ends(landscape.y) },
    axes: ["x", "y"],
    labels: { x: "along eigenvector 1", y: "along eigenvector 2" },
    shape: 0.72,
    aspect: landscape.normalise === null ? landscape.lengths[1] / landscape.lengths[0] : 1,
    paint(frame) {
      const [i, j] = [span(landscape.x, frame.view.x), span(landscape.y, frame.view.y)];
      const shown = known(landscape.values.slice(...i).map(row => row.slice(...j)));
      const scale = scaled(shown.length ? shown : known(landscape.values));
      limits[0].textContent = `loss ${number(scale.low)}`;
      limits[1].textContent = `${number(scale.high)}${scale.isLog ? " (log scale)" : ""}`;
      const box = { x: frame.left, y: frame.top, width: frame.right - frame.left, height: frame.bottom - frame.top };
      const [x, y] = [frame.x(0), frame.y(0)];
      return [
        svg("image", { ...box, preserveAspectRatio: "none", href: shaded(landscape, scale, frame, box) }),
        line("cross", x - 7, y, x + 7, y),
        line("cross", x, y - 7, x, y + 7),
      ];
    },
    find(frame, at) {
      const i = nearest([...landscape.x.keys()], k => landscape.x[k] - at.x);
      const j = nearest([...landscape.y.keys()], k => landscape.y[k] - at.y);
      const place = `at ${number(landscape.x[i])}, ${number(landscape.y[j])}`;
      return { x: landscape.x[i], y: landscape.y[j], text: `${place}\nloss ${number(landscape.values[i][j], 5)}` };
    },
    caption: [
      key("the parameters", line("cross", 6, 6, 18, 6), line("cross", 12, 0, 12, 12)),
      html("span", {}, limits[0], gradient(), limits[1]),
    ],
  });
}

const ends = values => [values[0], values.at(-1)];

// Start and end index of the points in a range, including one neighbour on each side.
function span(values, [low, high]) {
  const last = values.findIndex(value => value >= high);
  return [Math.max(values.findLastIndex(value => value <= low), 0), last < 0 ? values.length : last + 1];
}

const nearest = (items, difference) =>
  items.reduce((best, item) => (Math.abs(difference(item)) < Math.abs(difference(best)) ? item : best));

// Scale of the losses, which maps them to [0, 1] and to the range of an axis.
function scaled(values) {
  const low = Math.min(...values), high = Math.max(...values);
  const isLog = low > 0 && high > WIDE * low;
  const along = isLog ? Math.log : value => value;
  const back = isLog ? Math.exp : value => value;
  return {
    ...{ low, high, isLog, along },
    share: height => (high > low ? (height - along(low)) / (along(high) - along(low)) : 0),
    around(shown) {
      const [first, last] = [Math.min(...shown), Math.max(...shown)].map(along);
      const margin = 0.06 * (last - first) || 0.5 * Math.abs(first) || 1;
      return [back(first - margin), back(last + margin)];
    },
  };
}

// Picture of the visible part of the plane in bands, with bilinear interpolation between points.
function shaded(landscape, scale, frame, box) {
  const heights = landscape.values.map(row => row.map(value => (value === null ? NaN : scale.along(value))));
  const canvas = html("canvas", { width: Math.round(box.width), height: Math.round(box.height) });
  const across = Array.from({ length: canvas.width }, (_, i) => between(landscape.x, frame.fromX(frame.left + i + 0.5)));
  const context = canvas.getContext("2d");
  const picture = context.createImageData(canvas.width, canvas.height);
  for (let down = 0, at = 0; down < canvas.height; down++) {
    const [j, v] = between(landscape.y, frame.fromY(frame.top + down + 0.5));
    for (const [i, u] of across) {
      const first = heights[i][j] * (1 - v) + heights[i][j + 1] * v;
      const second = heights[i + 1][j] * (1 - v) + heights[i + 1][j + 1] * v;
      const share = scale.share(first * (1 - u) + second * u);
      if (!Number.isNaN(share)) picture.data.set([...shade(band(share)), 255], at);
      at += 4;
    }
  }
  context.putImageData(picture, 0, 0);
  return canvas.toDataURL();
}

// Cell of ascending values that contains a value, and the position within the cell.
function between(values, value) {
  const after = values.findIndex(other => other > value);
  const i = Math.min(Math.max((after < 0 ? values.length : after) - 1, 0), values.length - 2);
  return [i, (value - values[i]) / (values[i + 1] - values[i])];
}

const band = share => Math.min(Math.floor(share * LEVELS), LEVELS - 1) / (LEVELS - 1);

const PARTS = SHADES.map(shade => [1, 3, 5].map(i => parseInt(shade.slice(i, i + 2), 16)));

function shade(share) {
  const i = Math.min(Math.floor(share * (PARTS.length - 1)), PARTS.length - 2);
  const t = share * (PARTS.length - 1) - i;
  return PARTS[i].map((part, k) => Math.round(part * (1 - t) + PARTS[i + 1][k] * t));
}

function gradient() {
  const bands = Array.from({ length: LEVELS }, (_, i) => {
    const [from, to] = [i, i + 1].map(k => `${(100 * k) / LEVELS}%`);
    return `rgb(${shade(i / (LEVELS - 1))}) ${from} ${to}`;
  });
  const made = html("span", { class: "shades" });
  made.style.background = `linear-gradient(to right, ${bands})`;
  return made;
}
