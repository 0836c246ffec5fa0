// Charts of lines, such as losses of trainings, and densities of several runs.

const sized = values => values.filter(value => value !== null && Number.isFinite(value));

function linesChart(figure, { x, y, isLog, series }) {
  const all = series.flatMap(one => one.points);
  const shown = all.filter(([, value]) => value !== null && (!isLog || value > 0));
  if (!shown.length) return;
  const across = sized(shown.map(([at]) => at));
  const ends = [Math.min(...across), Math.max(...across)];
  const full = ends[1] > ends[0] ? ends : [ends[0] - 1, ends[1] + 1];

  const limits = ([low, high]) => {
    const visible = shown.filter(([at]) => low <= at && at <= high).map(([, value]) => value);
    const of = visible.length ? visible : shown.map(([, value]) => value);
    const [first, last] = [Math.min(...of), Math.max(...of)];
    if (isLog) return [first / 1.25, last * 1.25];
    const margin = 0.06 * (last - first) || 0.5 * Math.abs(first) || 1;
    return [first - margin, last + margin];
  };

  chart(figure, {
    full: { x: full, y: [0, 1] },
    axes: ["x"],
    labels: { x, y },
    isLog,
    shape: 0.5,
    range: view => limits(view.x),
    paint: frame => series.flatMap(one => drawn(frame, one, isLog)),
    find(frame, at) {
      const points = series.flatMap(one =>
        one.points
          .filter(([, value]) => value !== null && (!isLog || value > 0))
          .map(([place, value]) => ({ one, place, value })),
      );
      const distance = p => Math.hypot(frame.x(p.place) - frame.x(at.x), frame.y(p.value) - frame.y(at.y));
      const near = points.reduce((best, p) => (distance(p) < distance(best) ? p : best));
      return { x: near.place, y: near.value, text: `${near.one.name}\n${x} ${number(near.place)}: ${number(near.value)}` };
    },
    caption: series.map(one => key(one.name, line(kind(one), 0, 6, 24, 6))),
  });
}

const kind = one => `series s${one.run}${one.dashed ? " dashed" : ""}`;

// A line for each stretch of known points, and dots if there are few.
function drawn(frame, one, isLog) {
  const stretches = [[]];
  for (const [at, value] of one.points) {
    if (value === null || (isLog && value <= 0)) stretches.push([]);
    else stretches.at(-1).push([frame.x(at), frame.y(value)]);
  }
  const lines = stretches.filter(stretch => stretch.length > 1).map(stretch => path(kind(one), stretch));
  const points = stretches.flat();
  const dots = points.length > 40 ? [] : points.map(([cx, cy]) => svg("circle", { class: `dot s${one.run}`, cx, cy, r: 2.5 }));
  return [...lines, ...dots];
}
