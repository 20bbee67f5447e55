// Numbers and times as people read them.

const MINUS = "\u2212";
export const NONE = "\u2013";

const known = (value) => typeof value === "number" && Number.isFinite(value);

function digits(value, significant) {
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1e6 || size < 1e-3) return value.toExponential(Math.max(0, significant - 2)).replace("e+", "e");
  if (size >= 1000) return Number(value.toPrecision(Math.max(significant, 4))).toLocaleString("en");
  return String(Number(value.toPrecision(significant)));
}

// Four significant digits unless told; a dash where there is no number.
export function num(value, significant = 4) {
  return known(value) ? digits(value, significant).replaceAll("-", MINUS) : NONE;
}

export const signed = (value, significant = 3) =>
  known(value) ? (value > 0 ? "+" : "") + num(value, significant) : NONE;

export const count = (value) => (known(value) ? value.toLocaleString("en") : NONE);

export const share = (value) => (known(value) ? `${(100 * value).toFixed(1)} %` : NONE);

export function interval(lo, hi, significant = 3) {
  return known(lo) && known(hi) ? `${num(lo, significant)} to ${num(hi, significant)}` : NONE;
}

export function duration(seconds) {
  if (!known(seconds)) return NONE;
  if (seconds < 10) return `${num(seconds, 2)} s`;
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${num(seconds / 3600, 3)} h`;
  return `${num(seconds / 86400, 3)} days`;
}

// "2026-11-21T16:26:41+00:00" as "21 Nov 2026, 16:26:41 UTC"; anything else as it is.
export function moment(text) {
  const time = Date.parse(text);
  if (!/^\d{4}-\d\d-\d\dT/.test(text) || Number.isNaN(time)) return text;
  const parts = new Date(time).toUTCString().split(" ");
  return `${Number(parts[1])} ${parts[2]} ${parts[3]}, ${parts[4]} UTC`;
}

// Round values between low and high, about as many as asked for.
export function ticks(low, high, about) {
  const raw = (high - low) / Math.max(1, about);
  if (!(raw > 0) || !Number.isFinite(raw)) return [low];
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((n) => n * power).find((n) => n >= raw * 0.999);
  const found = [];
  const first = Math.ceil(low / step - 1e-9);
  for (let k = first; k < first + 100 && k * step <= high + step * 1e-9; k++) found.push(k * step);
  return found.length ? found : [low];
}

// Powers of ten, thinned; with 2 and 5 between where there are few.
export function logTicks(low, high, about) {
  const from = Math.floor(Math.log10(low));
  const to = Math.ceil(Math.log10(high));
  const every = Math.max(1, Math.ceil((to - from) / Math.max(1, about)));
  const between = to - from <= 2 ? [1, 2, 5] : [1];
  const found = [];
  for (let power = from; power <= to; power += every)
    for (const n of between) if (n * 10 ** power >= low * 0.999 && n * 10 ** power <= high * 1.001) found.push(n * 10 ** power);
  return found.length ? found : [low];
}

// Ticks share their digits: 0.50, 0.55, 0.60.
export function tickLabel(value, all) {
  if (value === 0) return "0";
  const size = Math.max(...all.map(Math.abs));
  const tidy = (text) => text.replace("e+", "e").replace(/\.0+(?=e|$)/, "").replaceAll("-", MINUS);
  if (size >= 1e6 || size < 1e-3) return tidy(value.toExponential(1));
  if (size >= 1e4) return `${tidy((value / 1000).toFixed(1))}k`;
  // A power of ten may stand alone on its scale; otherwise the distance says how many digits are needed.
  const step = all.length > 1 ? Math.min(...all.slice(1).map((next, i) => Math.abs(next - all[i]))) : Math.abs(value);
  let places = 0;
  while (places < 6 && Math.abs(step * 10 ** places - Math.round(step * 10 ** places)) > 1e-6 * 10 ** places * step) places++;
  return value.toFixed(places).replaceAll("-", MINUS);
}
