// Trajectory files of buildings side by side: returns of the days, and one day step by step.

import { $, el, labelled, replace, select } from "./dom.js";
import { Chart } from "./chart.js";
import { NONE, count, interval, num, share, signed } from "./format.js";
import { plain } from "./text.js";

// Two-sided 95 % of Student's t for 1 to 30 degrees of freedom; beyond, the first terms of its expansion.
const T = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.16, 2.145, 2.131, 2.12, 2.11, 2.101, 2.093, 2.086, 2.08, 2.074, 2.069, 2.064, 2.06, 2.056, 2.052, 2.048, 2.045, 2.042];

const quantile = (freedom) => T[freedom - 1] || 1.95996 + 2.37227 / freedom + 2.8225 / freedom ** 2;

const known = (values) => values.filter((value) => value !== null && value !== undefined);
const mean = (values) => (values.length ? values.reduce((a, b) => a + b, 0) / values.length : null);

// Mean of some values and its 95 % interval; no interval for fewer than two.
function estimate(values) {
  const middle = mean(values);
  if (values.length < 2) return { mean: middle, lo: null, hi: null };
  const spread = Math.sqrt(values.reduce((sum, value) => sum + (value - middle) ** 2, 0) / (values.length - 1));
  const half = (quantile(values.length - 1) * spread) / Math.sqrt(values.length);
  return { mean: middle, lo: middle - half, hi: middle + half };
}

const head = (...cells) => el("thead", {}, el("tr", {}, cells.map((cell) => {
  const number = cell.startsWith("#");
  return el("th", { scope: "col", class: number ? "number" : "" }, number ? cell.slice(1) : cell);
})));
const scrolled = (label, node) => el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": label }, node);
const number = (text) => el("td", { class: "number" }, text);

function table(runs) {
  const rows = runs.map((run) => {
    const { controller, world, episodes } = run.state.days;
    const found = estimate(known(episodes.map((episode) => episode.total)));
    const replies = episodes.reduce((sum, episode) => sum + episode.replies, 0);
    const part = (name) => (replies ? share(episodes.reduce((sum, episode) => sum + episode[name], 0) / replies) : NONE);
    return el("tr", { class: `run-${run.colour}` },
      el("th", { scope: "row" }, el("span", { class: "swatch" }), plain(run.label, 100)),
      el("td", {}, plain(controller, 60)), el("td", {}, plain(world, 120)), number(count(episodes.length)),
      number(num(found.mean)), number(interval(found.lo, found.hi)),
      number(num(mean(known(episodes.map((episode) => episode.energy))))), number(num(mean(known(episodes.map((episode) => episode.comfort))))),
      number(part("parsed")), number(part("fallback")));
  });
  return scrolled("Returns", el("table", { class: "results" },
    head("File", "Controller", "World", "#Days", "#Mean return", "#95 % interval", "#Energy a step", "#Comfort a step", "#Parsed", "#Fallback"), el("tbody", {}, rows)));
}

// Returns of the days that two files share, by task; where a file has a task more than once its first.
function shared(one, other) {
  const theirs = new Map();
  for (const episode of other.state.days.episodes) if (!theirs.has(episode.task)) theirs.set(episode.task, episode.total);
  const seen = new Set();
  const pairs = [];
  for (const { task, total } of one.state.days.episodes) {
    const their = theirs.get(task);
    if (seen.has(task) || total === null || their === null || their === undefined) continue;
    seen.add(task);
    pairs.push(total - their);
  }
  return pairs;
}

function differences(runs) {
  const rows = [];
  runs.forEach((one, i) => runs.slice(i + 1).forEach((other) => {
    const pairs = shared(other, one);
    if (!pairs.length) return;
    const found = estimate(pairs);
    rows.push(el("tr", {}, el("th", { scope: "row" }, plain(other.label, 80), " \u2212 ", plain(one.label, 80)),
      number(signed(found.mean)), number(interval(found.lo, found.hi)), number(count(pairs.length)),
      number(count(pairs.filter((value) => value > 0).length)), number(count(pairs.filter((value) => value < 0).length))));
  }));
  if (!rows.length) return runs.length > 1 ? el("p", { class: "nothing" }, "These files share no day, so their returns can't be compared day by day.") : null;
  return [el("h3", {}, "The same days, in pairs"), scrolled("Paired differences", el("table", { class: "results" },
    head("Difference of returns", "#Mean", "#95 % interval", "#Days", "#Better", "#Worse"), el("tbody", {}, rows.slice(0, 40))))];
}

const LINE = { clock: { x: [], y: [] }, smooth: false };

export class Days {
  constructor(app) {
    this.app = app;
    this.body = $("#days-body");
    this.task = null;
    this.told = "";
    this.charts = [];
    if (this.app.report.building) this.build();
  }

  // Files that are shown.
  runs() {
    return this.app.runs.filter((run) => run.state && run.state.days && run.shown);
  }

  build() {
    this.tables = el("div", {});
    this.chooser = el("div", { class: "toolbar" });
    this.note = el("p", { class: "nothing", hidden: true }, "No shown file has this day with its steps.");
    const returns = el("div", { class: "charts" });
    const day = el("div", { class: "charts" });
    replace(this.body, this.tables, el("h3", {}, "All days"), returns, el("h3", {}, "One day"), this.chooser, this.note, day);
    this.chart(returns, "Return by day of the year", "Day", (run) => this.byDay(run));
    this.chart(returns, "Mean reward by step of the day", "Step", (run) => ({ ...run.state.days.by_step }));
    this.chart(day, "Reward", "Step", (run) => this.column(run, "reward"));
    this.chart(day, "Temperature of the zones, mean with coldest and warmest, C", "Step", (run) => this.column(run, "inside", "low", "high"));
    this.chart(day, "Mean power, -1 full cooling to 1 full heating", "Step", (run) => this.column(run, "power"));
    this.chart(day, "Temperature outdoors, C", "Step", (run) => this.column(run, "outside"));
    this.update();
  }

  chart(grid, title, unit, columns) {
    const plot = el("div", {});
    grid.append(el("figure", { class: "chart" }, el("figcaption", {}, el("span", { class: "title" }, title)), plot));
    const lines = () => this.runs().map((run) => {
      const found = columns(run);
      return found && { ...LINE, run: run.number, colour: run.colour, label: run.label, ...found };
    }).filter(Boolean);
    this.charts.push(new Chart(plot, { title, lines, unit, group: `days ${unit}`, height: 210 }));
  }

  byDay(run) {
    const sorted = run.state.days.episodes.filter(({ day, total }) => day !== null && total !== null).sort((a, b) => a.day - b.day);
    return { x: sorted.map(({ day }) => day), y: sorted.map(({ total }) => total) };
  }

  column(run, name, low, high) {
    const { drawn } = run.state.days.episodes.find((episode) => episode.task === this.task && episode.drawn) || {};
    return drawn && { x: drawn.step, y: drawn[name], lo: low ? drawn[low] : null, hi: high ? drawn[high] : null };
  }

  // Days by task: those that most files have come first, each kind by day.
  tasks(runs) {
    const found = new Map();
    for (const run of runs) for (const { task, day, drawn } of run.state.days.episodes) {
      if (!drawn) continue;
      const known = found.get(task) || { task, day, files: new Set() };
      known.files.add(run.number);
      found.set(task, known);
    }
    return [...found.values()].sort((a, b) => b.files.size - a.files.size || (a.day ?? 999) - (b.day ?? 999));
  }

  update() {
    if (!this.tables) return;
    const runs = this.runs();
    const told = JSON.stringify(runs.map((run) => [run.number, run.label, run.state.path]));
    if (told === this.told) return; // nothing moves under the reader
    this.told = told;
    replace(this.tables, runs.length ? [table(runs), differences(runs)] : el("p", { class: "nothing" }, "No file is shown."));
    const tasks = this.tasks(runs);
    if (!tasks.some(({ task }) => task === this.task)) this.task = tasks.length ? tasks[0].task : null;
    const several = runs.length > 1;
    const choices = tasks.slice(0, 5000).map(({ task, day, files }) => [task, `${day === null ? "" : `day ${day}, `}${plain(task, 80)}${several ? ` (${files.size} of ${runs.length} files)` : ""}`]);
    replace(this.chooser, labelled("Day", select("Day", choices, this.task, (task) => {
      this.task = task;
      this.draw();
    })));
    this.draw();
  }

  draw() {
    this.note.hidden = this.task !== null;
    for (const chart of this.charts) chart.refresh();
  }
}
