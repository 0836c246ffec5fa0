// Formatting of numbers and ticks of axes.

const signed = text => text.replaceAll("-", "\u2212");

function number(value, digits = 4) {
  if (value === null || Number.isNaN(value)) return "unknown";
  const size = Math.abs(value);
  if (value !== 0 && (size < 1e-3 || size >= 1e6)) {
    return signed(value.toExponential(digits - 1).replace(/\.?0*e\+?/, "e"));
  }
  return signed(String(Number(value.toPrecision(digits))));
}

function linearTicks([low, high], count) {
  const rough = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find(factor => factor * power >= rough * (1 - 1e-9));
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  const short = digits <= 8 && Math.max(Math.abs(low), Math.abs(high)) < 1e6;
  const ticks = [];
  for (let i = Math.ceil(low / step); i * step <= high; i++) {
    const at = i * step;
    ticks.push({ at, text: short ? signed((at || 0).toFixed(digits)) : number(at, 6) });
  }
  return ticks;
}

function logTicks([low, high], count) {
  const first = Math.ceil(Math.log10(low) - 1e-9), last = Math.floor(Math.log10(high) + 1e-9);
  if (last - first < 1) return linearTicks([low, high], count);
  const step = Math.ceil((last - first + 1) / Math.max(1, count));
  const ticks = [];
  for (let power = Math.ceil(first / step) * step; power <= last; power += step) {
    ticks.push({ at: 10 ** power, text: "10" + raised(power) });
  }
  return ticks;
}

const raised = power =>
  String(power).replace(/./g, sign => (sign === "-" ? "\u207b" : "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"[sign]));
