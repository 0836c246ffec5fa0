// Zoomable charts: axes, tool buttons, and a tooltip at the pointer.

const MARGIN = { left: 58, right: 14, top: 10, bottom: 42 };

// Draws a chart into a figure.
//
//   full          full range of the data, {x: [low, high], y: [low, high]}
//   axes          axes that zoom, a subset of ["x", "y"]
//   labels        axis labels, {x, y}
//   isLog         whether y has a log scale
//   shape         ratio of height to width
//   aspect        length of a unit of y in units of x, for axes of equal scale; 0 for independent axes
//   range(view)   range of y for a view; the range of the view by default
//   paint(frame)  elements to draw; frame.x and frame.y map data to pixels
//   find(frame, point)  {x, y, text} of the nearest element to a point of the data, or null
//   caption       elements below the chart
//   tools         elements next to the buttons
function chart(figure, { full, axes, labels, isLog = false, shape, aspect = 0, range, paint, find, caption, tools = [] }) {
  let view = full;
  let frame = null;
  let waiting = false;
  const title = figure.querySelector("h2").textContent;
  const shown = html("output");
  const buttons = {
    out: button("\u2212", "zoom out", () => self.zoom(1.5)),
    in: button("+", "zoom in", () => self.zoom(1 / 1.5)),
    reset: button("reset", "show all", () => self.reset()),
  };
  const drawing = svg("svg", {
    role: "application",
    tabindex: 0,
    "aria-label": `${title}, a chart that can be zoomed`,
    "aria-describedby": "hint",
  });
  const painted = svg("g");
  const above = svg("g");
  const tip = html("div", { class: "tip", hidden: "", "aria-hidden": "true" });
  drawing.append(painted, above);

  const self = {
    zoom: (factor, centre = middle(view)) => show(zoomed(view, full, axes, factor, centre)),
    move: (axis, share) => axes.includes(axis) && show(moved(view, full, axis, share)),
    reset: () => show(full),
    isFull: () => axes.every(axis => width(view[axis]) >= width(full[axis])),
    at: event => frame.at(event),
    select(from, to) {
      const next = { ...view };
      for (const axis of axes) {
        const [low, high] = [from[axis], to[axis]].sort((a, b) => a - b);
        // A drag along one axis does not change the other axis.
        if (high - low > 0.02 * width(view[axis])) next[axis] = within([low, high], full[axis]);
      }
      show(next);
    },
    mark(from, to) {
      above.replaceChildren(...(from ? [frame.box(from, to, axes)] : []));
    },
    hover(event) {
      const nearby = event && find(frame, frame.at(event));
      tip.hidden = !nearby;
      if (!nearby) return;
      const x = frame.x(nearby.x), y = frame.y(nearby.y);
      tip.textContent = nearby.text;
      tip.style.left = `${Math.max(0, Math.min(x + 12, frame.width - tip.offsetWidth))}px`;
      tip.style.top = `${Math.max(0, y - tip.offsetHeight - 10)}px`;
      if (!event.buttons) above.replaceChildren(frame.hair(x, y));
    },
  };

  function show(next) {
    view = next;
    draw();
    return true;
  }

  function draw() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      frame = framed(drawing, view.x, range?.(view) ?? view.y, isLog, shape, aspect);
      painted.replaceChildren(...frame.axes(labels), frame.clipped(paint(frame)));
      above.replaceChildren();
      tip.hidden = true;
      shown.textContent = axes.map(axis => `${axes.length > 1 ? axis : labels[axis]} ${spread(view[axis])}`).join(", ");
      buttons.out.disabled = buttons.reset.disabled = self.isFull();
    });
  }

  figure.append(
    html("div", { class: "tools" }, shown, ...tools,
      html("span", {}, buttons.out, buttons.in, buttons.reset)),
    html("div", { class: "plot" }, drawing, tip),
    html("figcaption", {}, ...caption),
  );
  listen(drawing, self);
  drawing.addEventListener("pointerleave", () => above.replaceChildren());
  new ResizeObserver(draw).observe(figure);
  return draw;
}

const spread = ([low, high]) => `${number(low)} to ${number(high)}`;

function button(text, label, press) {
  const made = html("button", { type: "button", "aria-label": label, title: label }, text);
  made.addEventListener("click", press);
  return made;
}

// Maps data to pixels at the current size of the drawing.
function framed(drawing, x, y, isLog, shape, aspect) {
  const width = drawing.parentElement.clientWidth;
  const height = Math.round(Math.min(Math.max(shape * width, 260), 440));
  const [left, top] = [MARGIN.left, MARGIN.top];
  let [right, bottom] = [width - MARGIN.right, height - MARGIN.bottom];
  if (aspect) {
    const [across, down] = [x[1] - x[0], aspect * (y[1] - y[0])];
    const unit = Math.min((right - left) / across, (bottom - top) / down);
    [right, bottom] = [left + unit * across, top + unit * down];
  }
  drawing.setAttribute("viewBox", `0 0 ${width} ${height}`);
  drawing.setAttribute("height", height);
  const along = isLog ? Math.log : value => value;
  const back = isLog ? Math.exp : value => value;
  const [low, high] = y.map(along);
  const toX = value => left + ((value - x[0]) / (x[1] - x[0])) * (right - left);
  const toY = value => bottom - ((along(value) - low) / (high - low)) * (bottom - top);
  const fromX = pixel => x[0] + ((pixel - left) / (right - left)) * (x[1] - x[0]);
  const fromY = pixel => back(low + ((bottom - pixel) / (bottom - top)) * (high - low));

  const pixel = event => {
    const box = drawing.getBoundingClientRect();
    return [
      Math.min(Math.max(event.clientX - box.left, left), right),
      Math.min(Math.max(event.clientY - box.top, top), bottom),
    ];
  };

  return {
    ...{ width, height, left, right, top, bottom, x: toX, y: toY, fromX, fromY, view: { x, y } },
    at(event) {
      const [across, down] = pixel(event);
      return { x: fromX(across), y: fromY(down) };
    },
    box(from, to, axes) {
      const [a, b] = [pixel(from), pixel(to)];
      const tall = axes.includes("y");
      return svg("rect", {
        class: "selected",
        x: Math.min(a[0], b[0]),
        width: Math.abs(a[0] - b[0]),
        y: tall ? Math.min(a[1], b[1]) : top,
        height: tall ? Math.abs(a[1] - b[1]) : bottom - top,
      });
    },
    hair: (across, down) =>
      svg("g", {}, line("hair", across, top, across, bottom), line("hair", left, down, right, down)),
    // The clip region has a margin, so points at the ends of the range are drawn completely.
    clipped(children) {
      const [x, y, width, height] = [left - 6, top, right - left + 12, bottom - top];
      return svg("svg", { x, y, width, height, viewBox: `${x} ${y} ${width} ${height}` }, ...children);
    },
    axes(labels) {
      const ticksX = linearTicks(x, (right - left) / 90);
      const ticksY = (isLog ? logTicks : linearTicks)(y, (bottom - top) / 45);
      return [
        ...ticksY.flatMap(({ at, text }) => [
          line("grid", left, toY(at), right, toY(at)),
          svg("text", { x: left - 8, y: toY(at) + 4, "text-anchor": "end" }, text),
        ]),
        ...ticksX.flatMap(({ at, text }) => [
          line("axis", toX(at), bottom, toX(at), bottom + 5),
          svg("text", { x: toX(at), y: bottom + 19, "text-anchor": "middle" }, text),
        ]),
        line("axis", left, bottom, right, bottom),
        svg("text", { x: (left + right) / 2, y: height - 4, "text-anchor": "middle" }, labels.x),
        svg("text", { transform: `translate(12 ${(top + bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, labels.y),
      ];
    },
  };
}
