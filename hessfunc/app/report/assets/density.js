// Spectral density, smoothed again for each kernel width and each visible range.

// Number of widths beyond which a Gaussian is below rounding.
const REACH = 8;

function densityChart(figure, { density: estimate, eigenvalues, smallest }) {
  const probes = estimate.nodes.map((nodes, i) => atoms(nodes, estimate.masses[i]));
  const marks = [...marked(eigenvalues, i => `eigenvalue ${i + 1}`), ...marked(smallest, () => "smallest eigenvalue")];
  const ends = [...probes.flat().map(atom => atom.at), ...marks.map(mark => mark.at)].sort((a, b) => a - b);
  const [low, high] = [ends[0], ends.at(-1)];
  const margin = Math.max(5 * estimate.width, 0.03 * (high - low));
  let smoothing = estimate.width;

  const one = () => 1 / (estimate.n * smoothing * Math.sqrt(2 * Math.PI));
  const at = x => {
    const each = probes.map(probe => smoothed(probe, smoothing, x));
    const mean = each.reduce((sum, value) => sum + value, 0) / each.length;
    return { mean, low: Math.min(...each), high: Math.max(...each) };
  };

  const written = html("span");
  const slider = html("input", { type: "range", min: -2, max: 1, step: 0.05, value: 0, "aria-label": "width of the Gaussians" });
  const range = () => {
    const peak = Math.max(...probes.flat().map(atom => at(atom.at).mean));
    return [0.1 * Math.min(one(), peak), 3 * peak];
  };
  let limits = range();
  const relabel = () => (written.textContent = number(smoothing, 2));
  relabel();

  const draw = chart(figure, {
    full: { x: [low - margin, high + margin], y: limits },
    axes: ["x"],
    labels: { x: "eigenvalue", y: "density" },
    isLog: true,
    shape: 0.42,
    range: () => limits,
    paint(frame) {
      const [floor] = limits;
      const points = samples(frame, probes, smoothing).map(x => [x, at(x)]);
      // Values below the floor are drawn outside of the visible range.
      const edge = of => points.map(([x, value]) => [frame.x(x), frame.y(Math.max(of(value), 0.8 * floor))]);
      const mean = edge(value => value.mean);
      const ground = [[frame.right, frame.bottom], [frame.left, frame.bottom]];
      return [
        path("area", [...mean, ...ground]),
        path("band", [...edge(value => value.high), ...edge(value => value.low).reverse()]),
        line("one", frame.left, frame.y(one()), frame.right, frame.y(one())),
        path("curve", mean),
        ...marks.flatMap(mark => stick(frame, mark, one())),
      ];
    },
    find(frame, point) {
      const distance = mark => Math.abs(frame.x(mark.at) - frame.x(point.x));
      const near = marks.filter(mark => distance(mark) < 8).sort((a, b) => distance(a) - distance(b))[0];
      const x = near ? near.at : point.x;
      const value = at(x);
      const lines = near ? near.text : [`eigenvalue ${number(x)}`];
      const spread = probes.length > 1 ? ` (${number(value.low, 2)} to ${number(value.high, 2)})` : "";
      return { x, y: Math.max(value.mean, limits[0]), text: [...lines, `density ${number(value.mean, 3)}${spread}`].join("\n") };
    },
    tools: [html("label", {}, "smoothing", slider, written)],
    caption: [
      key(`density, from ${probes.length} probe${probes.length > 1 ? "s" : ""} of ${estimate.steps} steps`, line("curve", 0, 6, 24, 6)),
      ...(probes.length > 1 ? [key("range of the probes", svg("rect", { class: "band", y: 1, width: 24, height: 10 }))] : []),
      ...(marks.length ? [key("eigenvalues", line("stick", 12, 6, 12, 12), svg("circle", { class: "head", cx: 12, cy: 5, r: 3.5 }))] : []),
      key("height of one eigenvalue", line("one", 0, 6, 24, 6)),
    ],
  });

  slider.addEventListener("input", () => {
    smoothing = estimate.width * 10 ** Number(slider.value);
    limits = range();
    relabel();
    draw();
  });
}

// Point masses of one probe in ascending order, without padding of weight zero.
const atoms = (nodes, weights) =>
  nodes
    .map((node, i) => ({ at: node, weight: weights[i] }))
    .filter(atom => atom.weight > 0)
    .sort((a, b) => a.at - b.at);

function marked(pairs, name) {
  return (pairs?.values ?? []).map((value, i) => ({
    at: value,
    converged: pairs.converged[i],
    text: [
      `${name(i)}: ${number(value, 5)}`,
      `residual ${number(pairs.residuals[i], 2)}${pairs.converged[i] ? "" : ", not converged"}`,
    ],
  }));
}

function stick(frame, mark, height) {
  const x = frame.x(mark.at), y = frame.y(height);
  const kind = mark.converged ? "head" : "head hollow";
  return [line("stick", x, frame.bottom, x, y), svg("circle", { class: kind, cx: x, cy: y, r: 3.5 })];
}

// Sample points: every pixel, and every point mass if peaks are narrower than pixels.
function samples(frame, probes, smoothing) {
  const [low, high] = frame.view.x;
  const count = Math.round(frame.right - frame.left);
  const even = Array.from({ length: count + 1 }, (_, i) => low + ((high - low) * i) / count);
  if (smoothing > (3 * (high - low)) / count) return even;
  const masses = probes.flat().map(atom => atom.at).filter(x => low < x && x < high);
  return [...even, ...masses].sort((a, b) => a - b);
}

function smoothed(probe, width, x) {
  let sum = 0;
  for (let i = firstFrom(probe, x - REACH * width); i < probe.length && probe[i].at <= x + REACH * width; i++) {
    const z = (x - probe[i].at) / width;
    sum += probe[i].weight * Math.exp(-0.5 * z * z);
  }
  return sum / (width * Math.sqrt(2 * Math.PI));
}

function firstFrom(probe, x) {
  let [low, high] = [0, probe.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (probe[middle].at < x) low = middle + 1;
    else high = middle;
  }
  return low;
}
