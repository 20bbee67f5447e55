// A line chart in SVG. It draws itself when it is seen, follows the size of its box, and can be read by keyboard.

import { $, announce, el, svg } from "./dom.js";
import { duration, logTicks, num, tickLabel, ticks } from "./format.js";
import { plain } from "./text.js";

const EDGE = { top: 10, right: 12, bottom: 24, left: 46 };

// How all charts are drawn, and where their cursor stands.
export const view = { smoothing: 0.6, log: false, axis: "step", outliers: false, from: null, to: null };
const charts = new Set();
// Curves of fewer points are not smoothed: an average of so few would only hide them.
const FEW = 12;

const seen =
  typeof IntersectionObserver === "undefined"
    ? null
    : new IntersectionObserver(
        (entries) => {
          for (const entry of entries) {
            const chart = entry.target.chart;
            chart.visible = entry.isIntersecting;
            if (chart.visible && chart.stale) chart.draw();
          }
        },
        { rootMargin: "400px" },
      );
const sized =
  typeof ResizeObserver === "undefined" ? null : new ResizeObserver((entries) => entries.forEach((e) => e.target.chart.refresh()));

export function redraw() {
  for (const chart of charts) chart.refresh();
}

// A paper has no scrolling: everything is drawn.
window.addEventListener("beforeprint", () => charts.forEach((chart) => chart.draw()));

// Exponential average that starts unbiased; gaps stay gaps.
export function smooth(values, weight) {
  if (!weight) return values;
  let sum = 0;
  let mass = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = weight * sum + (1 - weight) * value;
    mass = weight * mass + (1 - weight);
    return sum / mass;
  });
}

// Index of the value in a sorted array that is nearest to x.
export function nearest(sorted, x) {
  let low = 0;
  let high = sorted.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < x) low = middle + 1;
    else high = middle;
  }
  return low > 0 && x - sorted[low - 1] <= sorted[low] - x ? low - 1 : low;
}

// Seconds at which a step ended, between the steps that the clock knows.
export function timeOf(clock, step) {
  const { x, y } = clock;
  if (!x.length) return null;
  if (step <= x[0]) return step <= 0 ? 0 : y[0];
  const at = x.findIndex((known) => known >= step);
  if (at < 0) return y[y.length - 1];
  const part = (step - x[at - 1]) / (x[at] - x[at - 1]);
  return y[at - 1] + part * (y[at] - y[at - 1]);
}

function times(clock, steps) {
  // Steps ascend, so one pass over the clock is enough.
  const { x, y } = clock;
  let at = 0;
  return steps.map((step) => {
    while (at < x.length && x[at] < step) at++;
    if (!x.length) return null;
    if (at === 0) return step <= 0 ? 0 : y[0];
    if (at >= x.length) return y[y.length - 1];
    const part = (step - x[at - 1]) / (x[at] - x[at - 1]);
    return y[at - 1] + part * (y[at] - y[at - 1]);
  });
}

// spec: { title, lines() -> [{ run, colour, label, x, y, lo, hi, clock, dots, smooth }], marks() -> [{ x, strong, label }], height,
// unit: what x counts ("Step"), group: charts of a group share their cursor }
// lines and marks are asked for whenever the chart is drawn, so that new values appear.
export class Chart {
  constructor(box, spec) {
    this.box = box;
    this.spec = spec;
    this.visible = seen === null;
    this.stale = true;
    this.cursor = null;
    box.chart = this;
    box.classList.add("plot");
    box.tabIndex = 0;
    box.setAttribute("role", "img");
    box.setAttribute("aria-roledescription", "chart");
    box.addEventListener("pointermove", (event) => this.hover(event));
    box.addEventListener("pointerleave", () => this.leave());
    box.addEventListener("pointerdown", (event) => this.press(event));
    box.addEventListener("dblclick", () => spec.zoom && spec.zoom(null, null));
    box.addEventListener("keydown", (event) => this.key(event));
    box.addEventListener("blur", () => this.leave());
    charts.add(this);
    if (seen) seen.observe(box);
    if (sized) sized.observe(box);
  }

  remove() {
    charts.delete(this);
    if (seen) seen.unobserve(this.box);
    if (sized) sized.unobserve(this.box);
    this.box.remove();
  }

  refresh() {
    this.stale = true;
    if (this.visible) this.draw();
  }

  draw() {
    this.stale = false;
    const width = Math.max(220, Math.round(this.box.clientWidth || 360));
    const height = this.spec.height || 190;
    this.frame = { left: EDGE.left, right: width - EDGE.right, top: EDGE.top, bottom: height - EDGE.bottom };
    const lines = this.spec
      .lines()
      .map((line) => this.placed(line))
      .filter((line) => line.x.length);
    this.lines = lines;
    const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, "aria-hidden": "true" });
    this.picture = picture;
    if (this.scale(lines)) {
      this.axes(picture, width);
      this.markers(picture);
      this.curves(picture);
    } else {
      picture.append(
        svg("text", { x: width / 2, y: height / 2, class: "empty", "text-anchor": "middle" }, this.why(lines)),
      );
    }
    this.guide = svg("line", { class: "guide", y1: this.frame.top, y2: this.frame.bottom, visibility: "hidden" });
    this.points = svg("g", {});
    picture.append(this.guide, this.points);
    this.box.replaceChildren(picture);
    this.describe();
    if (this.cursor !== null) this.point(this.cursor, false);
  }

  why(lines) {
    if (!lines.length) return "no run with it is shown";
    return view.log ? "no value above 0 for a log scale" : "no value in this range";
  }

  // The line on the axis that is shown, with its smoothed values.
  placed(line) {
    let { x, y } = line;
    const at = view.axis === "time" ? times(line.clock, x) : x;
    const kept = [];
    at.forEach((value, i) => {
      if (value === null) return;
      if (view.axis === "step" && ((view.from !== null && value < view.from) || (view.to !== null && value > view.to))) return;
      kept.push(i);
    });
    const pick = (values) => (values ? kept.map((i) => values[i]) : null);
    const raw = pick(y);
    const smoothed = line.smooth && view.smoothing > 0 && y.length >= FEW;
    const shown = smoothed ? pick(smooth(y, view.smoothing)) : raw;
    return { ...line, smoothed, steps: pick(x), x: pick(at), raw, y: shown, lo: pick(line.lo), hi: pick(line.hi) };
  }

  scale(lines) {
    let xs = [Infinity, -Infinity];
    const values = [];
    const take = (value) => {
      if (value !== null && value !== undefined && (!view.log || value > 0)) values.push(value);
    };
    for (const line of lines) {
      if (line.x.length) xs = [Math.min(xs[0], line.x[0]), Math.max(xs[1], line.x[line.x.length - 1])];
      for (const column of [line.y, line.raw, line.lo, line.hi]) if (column) column.forEach(take);
    }
    if (!values.length || xs[0] === Infinity) return false;
    let low = values.reduce((a, b) => Math.min(a, b));
    let high = values.reduce((a, b) => Math.max(a, b));
    if (view.outliers && values.length > 20) {
      values.sort((a, b) => a - b);
      low = values[Math.floor(0.02 * (values.length - 1))];
      high = values[Math.ceil(0.98 * (values.length - 1))];
    }
    // What differs in its last digits alone is flat: an axis can't be finer than its numbers.
    if (high - low <= 1e-9 * Math.max(Math.abs(low), Math.abs(high))) high = low;
    if (view.log) {
      if (low === high) [low, high] = [low / 2, high * 2];
      const pad = (high / low) ** 0.05;
      this.ys = [low / pad, high * pad];
    } else {
      if (low === high) [low, high] = [low - (Math.abs(low) * 0.1 || 1), high + (Math.abs(high) * 0.1 || 1)];
      const pad = (high - low) * 0.07;
      this.ys = [low - pad, high + pad];
      if (low >= 0 && this.ys[0] < 0) this.ys[0] = 0;
    }
    this.xs = xs[0] === xs[1] ? [xs[0] - 1, xs[1] + 1] : xs;
    return true;
  }

  px(x) {
    const { left, right } = this.frame;
    return left + ((x - this.xs[0]) / (this.xs[1] - this.xs[0])) * (right - left);
  }

  py(y) {
    const { top, bottom } = this.frame;
    const [low, high] = this.ys;
    if (view.log) {
      if (!(y > 0)) return null;
      return bottom - (Math.log(y / low) / Math.log(high / low)) * (bottom - top);
    }
    return bottom - ((y - low) / (high - low)) * (bottom - top);
  }

  axes(picture, width) {
    const { left, right, top, bottom } = this.frame;
    const rows = view.log ? logTicks(...this.ys, 4) : ticks(...this.ys, Math.min(8, Math.max(3, (bottom - top) / 42)));
    for (const value of rows) {
      const y = this.py(value);
      if (y === null || y < top - 1 || y > bottom + 1) continue;
      picture.append(
        svg("line", { class: "grid", x1: left, x2: right, y1: y, y2: y }),
        svg("text", { class: "tick", x: left - 6, y: y + 3.5, "text-anchor": "end" }, tickLabel(value, rows)),
      );
    }
    const columns = ticks(...this.xs, Math.min(10, width / 90)).filter((value) => view.axis === "time" || Number.isInteger(value));
    columns.forEach((value) => {
      const x = this.px(value);
      const text = view.axis === "time" ? duration(value) : tickLabel(value, columns);
      const anchor = x > right - 14 ? "end" : x < left + 14 ? "start" : "middle";
      picture.append(svg("text", { class: "tick", x, y: bottom + 16, "text-anchor": anchor }, text));
    });
    picture.append(svg("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }));
  }

  markers(picture) {
    const { top, bottom, left, right } = this.frame;
    const taken = new Set();
    for (const mark of this.spec.marks ? this.spec.marks() : []) {
      const at = view.axis === "time" ? timeOf(mark.clock, mark.x) : mark.x;
      if (at === null) continue;
      const x = Math.round(this.px(at));
      if (x < left - 1 || x > right + 1 || (taken.has(x) && !mark.strong)) continue;
      taken.add(x);
      const kind = mark.strong ? "mark strong" : "mark";
      picture.append(
        svg("line", { class: kind, x1: x, x2: x, y1: top, y2: bottom }),
        svg("path", { class: kind, d: `M${x - 4} ${bottom + 6}h8l-4 -7z` }),
      );
    }
  }

  path(xs, ys) {
    let d = "";
    let pen = false;
    for (let i = 0; i < xs.length; i++) {
      const y = ys[i] === null || ys[i] === undefined ? null : this.py(ys[i]);
      if (y === null) {
        pen = false;
        continue;
      }
      d += `${pen ? "L" : "M"}${this.px(xs[i]).toFixed(1)} ${Math.max(-2000, Math.min(4000, y)).toFixed(1)}`;
      pen = true;
    }
    return d;
  }

  curves(picture) {
    const { left, right, top, bottom } = this.frame;
    const id = `clip-${Math.round(left)}-${Math.round(right)}-${Math.round(bottom)}`;
    picture.append(
      svg("clipPath", { id }, svg("rect", { x: left - 5, y: top - 5, width: right - left + 10, height: bottom - top + 10 })),
    );
    const plot = svg("g", { "clip-path": `url(#${id})` });
    for (const line of this.lines) {
      const group = svg("g", { class: `run-${line.colour}` });
      if (line.lo && line.hi) {
        const known = line.x.map((_, i) => i).filter((i) => line.lo[i] !== null && line.hi[i] !== null);
        const edge = (values, order) => order.map((i) => `${this.px(line.x[i]).toFixed(1)} ${(this.py(values[i]) ?? bottom).toFixed(1)}`);
        if (known.length > 1) {
          const outline = [...edge(line.hi, known), ...edge(line.lo, [...known].reverse())];
          group.append(svg("path", { class: "band", d: `M${outline.join("L")}Z` }));
        }
        for (const i of known.length === 1 ? known : []) {
          const x = this.px(line.x[i]);
          group.append(svg("line", { class: "whisker", x1: x, x2: x, y1: this.py(line.lo[i]) ?? top, y2: this.py(line.hi[i]) ?? bottom }));
        }
      }
      if (line.smoothed) group.append(svg("path", { class: "line raw", d: this.path(line.x, line.raw) }));
      group.append(svg("path", { class: line.dots ? "line held-out" : "line", d: this.path(line.x, line.y) }));
      const dots = line.dots || line.x.length < 25;
      if (dots && line.x.length < 120) {
        line.x.forEach((x, i) => {
          const y = line.y[i] === null ? null : this.py(line.y[i]);
          if (y !== null) group.append(svg("circle", { class: line.dots ? "dot hollow" : "dot", cx: this.px(x).toFixed(1), cy: y.toFixed(1), r: line.dots ? 3.2 : 2.2 }));
        });
      }
      plot.append(group);
    }
    picture.append(plot);
  }

  describe() {
    const parts = this.lines.map((line) => {
      const last = line.y.length - 1;
      return `${plain(line.label, 80)}: ${num(line.y[last])} at ${view.axis === "time" ? duration(line.x[last]) : `${(this.spec.unit || "Step").toLowerCase()} ${line.x[last]}`}`;
    });
    this.box.setAttribute("aria-label", `${plain(this.spec.title, 120)}. ${parts.join("; ") || "no values"}. Arrow keys read values.`);
  }

  // Where a pointer stands, in the values of the horizontal axis.
  at(event) {
    const box = this.box.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * this.picture.viewBox.baseVal.width;
    const { left, right } = this.frame;
    return this.xs[0] + (Math.max(0, Math.min(1, (x - left) / (right - left)))) * (this.xs[1] - this.xs[0]);
  }

  hover(event) {
    if (!this.xs || !this.lines.length) return;
    const x = this.at(event);
    if (this.dragged) this.select(x);
    this.point(x, true, event);
  }

  press(event) {
    if (event.button !== 0 || !this.spec.zoom || view.axis !== "step" || !this.xs || event.pointerType === "touch") return;
    this.dragged = { from: this.at(event), rect: svg("rect", { class: "selection", y: this.frame.top, height: this.frame.bottom - this.frame.top, width: 0 }) };
    this.picture.append(this.dragged.rect);
    const release = () => {
      window.removeEventListener("pointerup", release);
      const { from, to, rect } = this.dragged;
      this.dragged = null;
      rect.remove();
      if (to !== undefined && Math.abs(this.px(to) - this.px(from)) > 8)
        this.spec.zoom(Math.round(Math.min(from, to)), Math.round(Math.max(from, to)));
    };
    window.addEventListener("pointerup", release);
  }

  select(x) {
    const { from, rect } = this.dragged;
    this.dragged.to = x;
    const [a, b] = [this.px(from), this.px(x)].sort((p, q) => p - q);
    rect.setAttribute("x", a);
    rect.setAttribute("width", b - a);
  }

  leave() {
    if (this.box === document.activeElement && this.cursor !== null && !this.hovering) return;
    this.hovering = false;
    for (const chart of charts) chart.hide();
    $("#tip").hidden = true;
  }

  hide() {
    this.cursor = null;
    if (!this.guide) return;
    this.guide.setAttribute("visibility", "hidden");
    this.points.replaceChildren();
  }

  // The cursor at x, here and in every chart that is seen.
  point(x, share, event) {
    this.hovering = Boolean(event);
    const rows = this.mark(x);
    if (!share) return rows;
    for (const chart of charts) if (chart !== this && chart.visible && chart.xs && chart.spec.group === this.spec.group) chart.mark(x);
    this.tip(rows, event);
    return rows;
  }

  mark(x) {
    this.cursor = x;
    if (!this.xs || !this.guide) return [];
    this.points.replaceChildren();
    const rows = [];
    for (const line of this.lines) {
      const i = nearest(line.x, x);
      const value = line.y[i];
      rows.push({ line, i });
      const y = value === null ? null : this.py(value);
      if (y !== null && y >= this.frame.top - 3 && y <= this.frame.bottom + 3)
        this.points.append(svg("circle", { class: `cursor run-${line.colour}`, cx: this.px(line.x[i]), cy: y, r: 3.6 }));
    }
    const inside = x >= this.xs[0] && x <= this.xs[1];
    this.guide.setAttribute("visibility", inside ? "visible" : "hidden");
    this.guide.setAttribute("x1", this.px(x));
    this.guide.setAttribute("x2", this.px(x));
    return rows;
  }

  tip(rows, event) {
    const tip = $("#tip");
    const closest = rows.length ? rows.map(({ line, i }) => line.x[i]).sort((a, b) => Math.abs(a - this.cursor) - Math.abs(b - this.cursor))[0] : this.cursor;
    const head = view.axis === "time" ? duration(closest) : `${this.spec.unit || "Step"} ${num(closest, 6)}`;
    const near = (this.spec.marks ? this.spec.marks() : []).filter((mark) => {
      const at = view.axis === "time" ? timeOf(mark.clock, mark.x) : mark.x;
      return at !== null && Math.abs(this.px(at) - this.px(this.cursor)) < 6;
    });
    tip.replaceChildren(
      el("strong", {}, head),
      ...rows.slice(0, 14).map(({ line, i }) =>
        el(
          "div",
          { class: `tip-row run-${line.colour}` },
          el("span", { class: line.dots ? "swatch hollow" : "swatch" }),
          el("span", { class: "tip-label" }, plain(line.label, 60)),
          el("b", {}, num(line.raw[i], 5)),
          line.smoothed ? el("i", {}, `smoothed ${num(line.y[i])}`) : null,
          line.lo && line.lo[i] !== null ? el("i", {}, `${num(line.lo[i])} to ${num(line.hi[i])}`) : null,
        ),
      ),
      ...near.slice(0, 3).map((mark) => el("div", { class: "tip-mark" }, plain(mark.label, 90))),
    );
    tip.hidden = false;
    const box = this.box.getBoundingClientRect();
    const x = event ? event.clientX : box.left + (this.px(this.cursor) / this.picture.viewBox.baseVal.width) * box.width;
    const y = event ? event.clientY : box.top + 8;
    const { offsetWidth: w, offsetHeight: h } = tip;
    const left = x + 16 + w > window.innerWidth - 8 ? Math.max(8, x - 16 - w) : x + 16;
    const top = Math.max(8, Math.min(window.innerHeight - h - 8, y - h / 2));
    tip.style.setProperty("left", `${left}px`);
    tip.style.setProperty("top", `${top}px`);
  }

  key(event) {
    if (!this.lines || !this.lines.length || event.target !== this.box) return;
    const all = this.lines.reduce((a, line) => (line.x.length > a.length ? line.x : a), []);
    const here = this.cursor === null ? all.length - 1 : nearest(all, this.cursor);
    const leap = event.shiftKey ? 10 : 1;
    const to = { ArrowLeft: here - leap, ArrowRight: here + leap, Home: 0, End: all.length - 1 }[event.key];
    if (event.key === "Escape" && this.cursor !== null) {
      event.stopPropagation();
      for (const chart of charts) chart.hide();
      $("#tip").hidden = true;
      return;
    }
    if (to === undefined) return;
    event.preventDefault();
    const i = this.cursor === null && event.key.startsWith("Arrow") ? here : Math.max(0, Math.min(all.length - 1, to));
    const rows = this.point(all[i], true);
    const where = view.axis === "time" ? duration(all[i]) : `${(this.spec.unit || "Step").toLowerCase()} ${all[i]}`;
    announce(`${where}: ${rows.map(({ line, i: at }) => `${plain(line.label, 60)} ${num(line.raw[at])}`).join(", ")}`);
  }
}
