// Held-out results: returns with their intervals, metrics of held-out data, and paired differences.

import { $, el, replace, svg } from "./dom.js";
import { NONE, count, interval, num, share, signed, tickLabel, ticks } from "./format.js";
import { verdict } from "./summary.js";
import { plain } from "./text.js";

// Where it is known whether more is better; of anything else it is only said which way it went.
const MORE = /^(return|accuracy|margin|win_rate|reward|reward_chosen|reward\/.*|pass@\d+|parsed)$/;
const LESS = /^(loss|nll|perplexity|preference_loss)$/;
const WIDTH = 300;

// A mean and its interval on an axis that all rows of a table share.
function whisker(axis, { mean, lo, hi }, kind) {
  const at = (value) => 8 + ((value - axis.low) / (axis.high - axis.low)) * (WIDTH - 16);
  if (mean === null) return null;
  const parts = [];
  for (const tick of axis.ticks) parts.push(svg("line", { class: tick === 0 ? "grid zero" : "grid", x1: at(tick), x2: at(tick), y1: 0, y2: 26 }));
  if (lo !== null && hi !== null) {
    parts.push(svg("line", { class: "whisker", x1: at(lo), x2: at(hi), y1: 13, y2: 13 }));
    for (const end of [lo, hi]) parts.push(svg("line", { class: "whisker", x1: at(end), x2: at(end), y1: 9, y2: 17 }));
  }
  parts.push(svg("circle", { class: "mean", cx: at(mean), cy: 13, r: 4.5 }));
  return svg("svg", { class: `forest ${kind}`, viewBox: `0 0 ${WIDTH} 26`, width: WIDTH, height: 26, "aria-hidden": "true" }, parts);
}

function axisOf(items, zero) {
  const values = items.flatMap(({ mean, lo, hi }) => [mean, lo, hi]).filter((value) => value !== null);
  if (!values.length) return null;
  if (zero) values.push(0);
  let [low, high] = [Math.min(...values), Math.max(...values)];
  if (low === high) [low, high] = [low - 1, high + 1];
  const pad = (high - low) * 0.05;
  return { low: low - pad, high: high + pad, ticks: ticks(low, high, 3) };
}

function scaleRow(axis) {
  const at = (value) => 8 + ((value - axis.low) / (axis.high - axis.low)) * (WIDTH - 16);
  return svg("svg", { class: "forest", viewBox: `0 0 ${WIDTH} 16`, width: WIDTH, height: 16, "aria-hidden": "true" },
    axis.ticks.map((tick) => svg("text", { class: "tick", x: at(tick), y: 12, "text-anchor": "middle" }, tickLabel(tick, axis.ticks))));
}

// Cells that begin with "#" head a column of numbers.
const head = (...cells) => el("thead", {}, el("tr", {}, cells.map((cell) => {
  const number = typeof cell === "string" && cell.startsWith("#");
  return el("th", { scope: "col", class: number ? "number" : "" }, number ? cell.slice(1) : cell);
})));
const scrolled = (label, node) => el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": label }, node);

function returnsTable(found, axis) {
  const trained = found.differences.length ? found.differences[0].of[0] : "trained model";
  const extra = [...new Set(found.results.flatMap((result) => result.metrics.map(([name]) => name)))].slice(0, 40);
  const has = (key) => found.results.some((result) => result[key] !== null);
  const columns = [
    ["Tasks", "tasks", (r) => count(r.tasks) + (r.failed ? ` (${count(r.failed)} failed)` : "")],
    ["Parsed", "parsed", (r) => share(r.parsed)],
    ["Fallback", "fallback", (r) => share(r.fallback)],
    ["Tokens a reply", "reply_tokens", (r) => num(r.reply_tokens, 3)],
  ].filter(([, key]) => has(key));
  const rows = found.results.map((result) => {
    const kind = result.name === trained ? "trained" : /base|start/i.test(result.name) ? "base" : "other";
    return el("tr", { class: kind }, el("th", { scope: "row" }, plain(result.name, 100)),
      el("td", { class: "number" }, num(result.mean)), el("td", { class: "number" }, interval(result.lo, result.hi)),
      el("td", { class: "picture" }, axis && whisker(axis, result, kind)),
      columns.map(([, , show]) => el("td", { class: "number" }, show(result))),
      extra.map((name) => el("td", { class: "number" }, num((result.metrics.find(([one]) => one === name) || [])[1]))));
  });
  return scrolled("Held-out returns", el("table", { class: "results" },
    head("Policy", "#Mean return", "#95 % interval", axis ? scaleRow(axis) : "", ...columns.map(([text]) => `#${text}`), ...extra.map((name) => `#${plain(name, 60)}`)), el("tbody", {}, rows)));
}

function tally([better, equal, worse]) {
  const total = better + equal + worse;
  const part = (size, kind, text) => size ? el("span", { class: kind, title: text }, "") : null;
  const bar = el("span", { class: "tally", "aria-hidden": "true" }, part(better, "good", "better"), part(equal, "level", "equal"), part(worse, "bad", "worse"));
  [better, equal, worse].filter(Boolean).forEach((size, i) => bar.children[i].style.setProperty("flex-grow", String(size / total)));
  return el("span", {}, bar, `better on ${count(better)}${equal ? `, equal on ${count(equal)}` : ""}, worse on ${count(worse)}`);
}

function direction(difference) {
  const [word] = verdict(difference, true);
  return [{ better: "higher", worse: "lower" }[word] || word, "level"];
}

function differences(found) {
  if (!found.length) return null;
  const axis = axisOf(found, true);
  const rows = found.map((difference) => {
    const metric = difference.metric || "return";
    const [word, kind] = MORE.test(metric) || LESS.test(metric) ? verdict(difference, MORE.test(metric)) : direction(difference);
    return el("tr", {}, el("th", { scope: "row" }, plain(difference.of[0], 80), " \u2212 ", plain(difference.of[1], 80)),
      difference.metric ? el("td", {}, plain(difference.metric, 80)) : null,
      el("td", { class: `number ${kind}` }, signed(difference.mean)), el("td", { class: "number" }, interval(difference.lo, difference.hi)),
      difference.metric ? null : el("td", { class: "picture" }, axis && whisker(axis, difference, kind || "other")),
      el("td", {}, el("span", { class: `word ${kind}` }, word)), el("td", {}, difference.tally ? tally(difference.tally) : `${count(difference.tasks)} compared`));
  });
  const metrics = found.some((difference) => difference.metric);
  return [el("h4", {}, "Paired differences"), scrolled("Paired differences", el("table", { class: "results" },
    head("Difference", ...(metrics ? ["Metric"] : []), "#Mean", "#95 % interval", ...(metrics ? [] : [axis ? scaleRow(axis) : ""]), "", metrics ? "Records" : "Task by task"), el("tbody", {}, rows)))];
}

function heldOut(found) {
  const rows = found.metrics.map(([name, values]) =>
    el("tr", {}, el("th", { scope: "row" }, plain(name, 100)), values.map((value) => el("td", { class: "number" }, num(value)))));
  return scrolled("Held-out data", el("table", { class: "results" }, head("Metric", ...found.models.map((name) => `#${plain(name, 80)}`)), el("tbody", {}, rows)));
}

export class Evaluation {
  constructor(app) {
    this.app = app;
    this.body = $("#evaluation-body");
    this.told = "";
    this.update();
  }

  update() {
    const runs = this.app.runs.filter((run) => run.state && run.shown);
    const told = JSON.stringify(runs.map((run) => [run.number, run.state.evaluation]));
    if (told === this.told) return; // nothing moves under the reader
    this.told = told;
    const all = runs.filter((run) => run.state.evaluation.returns || run.state.evaluation.held_out);
    // Runs that were measured in the same world share an axis.
    const axes = new Map();
    for (const run of all) {
      const { returns } = run.state.evaluation;
      if (returns) axes.set(returns.heading, [...(axes.get(returns.heading) || []), ...returns.results]);
    }
    for (const [heading, results] of axes) axes.set(heading, axisOf(results, false));
    replace(this.body, all.length ? all.map((run) => this.block(run, axes)) : el("p", { class: "nothing" }, "No final evaluation yet (evaluation.json). Held-out figures during training are among the curves."));
  }

  block(run, axes) {
    const { returns, held_out: held } = run.state.evaluation;
    return el("div", { class: `block run-${run.colour}` },
      this.app.runs.length > 1 ? el("h3", {}, el("span", { class: "swatch" }), plain(run.label, 120)) : null,
      returns ? [el("p", { class: "heading" }, plain(returns.heading, 600)), returnsTable(returns, axes.get(returns.heading)), differences(returns.differences)] : null,
      held ? [el("p", { class: "heading" }, plain(held.heading, 600)), heldOut(held), differences(held.differences)] : null);
  }
}
