// Visible range of a chart, controlled by wheel, drag, pinch, keys and double-click.
//
// A view has a range [low, high] for each axis, "x" and "y". Axes that zoom stay within the full
// view; the other axes do not change.

const CLOSEST = 1e-6;

const width = ([low, high]) => high - low;

function within([low, high], full) {
  if (high - low >= width(full)) return full;
  const shift = Math.max(full[0] - low, 0) + Math.min(full[1] - high, 0);
  return [low + shift, high + shift];
}

function zoomed(view, full, axes, factor, centre) {
  const next = { ...view };
  for (const axis of axes) {
    const size = Math.max(width(view[axis]) * factor, width(full[axis]) * CLOSEST);
    const share = (centre[axis] - view[axis][0]) / width(view[axis]);
    const low = centre[axis] - share * size;
    next[axis] = within([low, low + size], full[axis]);
  }
  return next;
}

function moved(view, full, axis, share) {
  const by = share * width(view[axis]);
  return { ...view, [axis]: within(view[axis].map(end => end + by), full[axis]) };
}

const middle = view =>
  Object.fromEntries(Object.entries(view).map(([axis, [low, high]]) => [axis, (low + high) / 2]));

// Actions by the browser's name of the key.
const KEYS = {
  "+": chart => chart.zoom(1 / 1.5),
  "=": chart => chart.zoom(1 / 1.5),
  "-": chart => chart.zoom(1.5),
  "0": chart => chart.reset(),
  Escape: chart => chart.reset(),
  ArrowLeft: chart => chart.move("x", -0.2),
  ArrowRight: chart => chart.move("x", 0.2),
  ArrowDown: chart => chart.move("y", -0.2),
  ArrowUp: chart => chart.move("y", 0.2),
};

// Adds the listeners to an element. The chart has zoom(factor, centre), move(axis, share), reset(),
// select(from, to), at(event) -> a point of the data, mark(from, to), hover(event), and isFull().
function listen(element, chart) {
  const pointers = new Map();
  let start = null;
  let spread = null;

  element.addEventListener("wheel", event => {
    // A chart that cannot zoom out does not capture the scrolling of the page.
    if (event.deltaY > 0 && chart.isFull()) return;
    event.preventDefault();
    chart.zoom(Math.exp(0.0015 * event.deltaY * (event.deltaMode ? 16 : 1)), chart.at(event));
  }, { passive: false });

  element.addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (KEYS[event.key]?.(chart)) event.preventDefault();
  });

  element.addEventListener("dblclick", () => chart.reset());

  element.addEventListener("pointerdown", event => {
    if (event.button) return;
    element.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, event);
    start = pointers.size === 1 ? event : null;
    spread = null;
    chart.mark(null);
  });

  element.addEventListener("pointermove", event => {
    if (pointers.has(event.pointerId)) pointers.set(event.pointerId, event);
    if (pointers.size === 2) {
      const [one, other] = pointers.values();
      const now = Math.hypot(one.clientX - other.clientX, one.clientY - other.clientY);
      if (spread) chart.zoom(spread / now, chart.at(event));
      spread = now;
    } else if (start && isDrag(start, event)) {
      chart.mark(start, event);
    }
    chart.hover(pointers.size > 1 ? null : event);
  });

  element.addEventListener("pointerup", event => {
    if (start && isDrag(start, event)) chart.select(chart.at(start), chart.at(event));
    leave(event);
  });
  element.addEventListener("pointercancel", leave);
  element.addEventListener("pointerleave", () => chart.hover(null));

  function leave(event) {
    pointers.delete(event.pointerId);
    start = null;
    chart.mark(null);
  }
}

const isDrag = (from, to) => Math.hypot(to.clientX - from.clientX, to.clientY - from.clientY) > 6;
