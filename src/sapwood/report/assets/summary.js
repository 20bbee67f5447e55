// What ran, how far it came, and what it is worth.

import { $, el, replace, svg } from "./dom.js";
import { Chart } from "./chart.js";
import { NONE, count, duration, interval, moment, num, signed } from "./format.js";
import { plain } from "./text.js";

const STATES = {
  running: ["Running", "\u25b6"],
  finished: ["Finished", "\u2713"],
  stopped: ["Stopped", "\u25a0"],
  died: ["Died", "\u2715"],
  empty: ["Nothing yet", "\u2026"],
  file: ["Trajectories", "\u2261"],
};

export function pill(status) {
  const [name, sign] = STATES[status.state] || [plain(status.state, 20), "?"];
  return el("span", { class: `pill ${STATES[status.state] ? status.state : "empty"}` }, el("span", { "aria-hidden": "true" }, sign), " ", name);
}

function figure(label, value, note, kind = "") {
  return el("div", { class: `figure ${kind}` }, el("dt", {}, label), el("dd", {}, el("b", {}, value), note ? el("small", {}, note) : null));
}

// What a paired difference says, in a word that doesn't need colour.
export function verdict(difference, more) {
  if (!difference || difference.mean === null) return ["", ""];
  const { mean, lo, hi } = difference;
  if (lo === null || hi === null) return [mean === 0 ? "equal" : (mean > 0) === more ? "better" : "worse", ""];
  if (lo <= 0 && hi >= 0) return ["no clear difference", "level"];
  return (mean > 0) === more ? ["better", "good"] : ["worse", "bad"];
}

function headline(state) {
  const head = state.headline;
  if (!head) {
    const last = ["reward", "loss"].map((name) => state.curves.find((curve) => curve.name === name)).find(Boolean);
    if (!last) return null;
    return el("dl", { class: "figures" }, figure(last.title, num(last.y.findLast((y) => y !== null)), `at step ${count(last.x[last.x.length - 1])}; nothing was held out`));
  }
  const point = (label, at) => at && figure(label, num(at.value), [at.lo === null ? "" : `95 %: ${interval(at.lo, at.hi)}`, at.step ? `step ${count(at.step)}` : ""].filter(Boolean).join(" \u00b7 "));
  const difference = head.difference;
  const [word, kind] = verdict(difference, head.more);
  return el(
    "div",
    {},
    el("h3", { class: "measure" }, plain(head.title, 80), el("small", {}, head.more ? " held out, more is better" : " held out, less is better")),
    el(
      "dl",
      { class: "figures" },
      point("Before training", head.base),
      head.best && head.last && head.best.step !== head.last.step ? point("Best", head.best) : null,
      point(head.best && head.last && head.best.step === head.last.step ? "Last, and best" : "Last", head.last),
      difference
        ? figure(
            `${plain(difference.of[0], 40)} \u2212 ${plain(difference.of[1], 40)}`,
            signed(difference.mean),
            `${word}${difference.lo === null ? "" : `; 95 %: ${interval(difference.lo, difference.hi)}`}${difference.tasks ? ` (${count(difference.tasks)} ${head.name === "eval/return" ? "tasks" : "records"})` : ""}`,
            kind,
          )
        : head.base && head.last
          ? figure("Change", signed(head.last.value - head.base.value), "no paired comparison is recorded")
          : null,
    ),
  );
}

// The name of the metric that tells most about a run.
function telling(run) {
  if (run.state.headline) return run.state.headline.name;
  return run.state.curves.some((curve) => curve.name === "reward") ? "reward" : "loss";
}

function shownTitle(run) {
  const curve = run.state.curves.find((one) => one.name === telling(run));
  if (!curve) return "";
  return curve.name.startsWith("eval/") ? `${curve.title}, held out` : curve.title;
}

// That metric over the steps, small.
function spark(run) {
  const curve = run.state.curves.find((one) => one.name === telling(run));
  if (!curve || curve.x.length < 3) return null;
  const known = curve.x.map((x, i) => [x, curve.y[i]]).filter(([, y]) => y !== null);
  if (known.length < 3) return null;
  const ys = known.map(([, y]) => y);
  const [low, high] = [Math.min(...ys), Math.max(...ys)];
  const [first, last] = [known[0][0], known[known.length - 1][0]];
  const at = ([x, y]) => `${((x - first) / (last - first || 1)) * 232 + 4} ${40 - ((y - low) / (high - low || 1)) * 32}`;
  return el("div", { class: "spark" }, svg("svg", { viewBox: "0 0 240 46", "aria-hidden": "true", preserveAspectRatio: "none" },
    svg("path", { class: "line", d: `M${known.map(at).join("L")}` })));
}

// The same for a run that is shown alone, as a chart. It outlives every update, so that a reader's cursor stays.
function picture(app) {
  const plot = el("div", {});
  const run = () => app.runs.find((one) => one.state);
  const lines = () => {
    if (!run()) return [];
    const { curves, clock } = run().state;
    const named = (name) => curves.find((curve) => curve.name === name);
    const name = telling(run());
    const curve = named(name);
    if (!curve) return [];
    const heldOut = name.startsWith("eval/");
    const bounds = name === "eval/return" ? ["eval/low", "eval/high"] : [`${name}/lo`, `${name}/hi`];
    const [lo, hi] = bounds.map((bound) => named(bound)).map((one) => one && one.x.length === curve.x.length ? one.y : null);
    return [{ run: run().number, colour: run().colour, label: curve.title, clock, x: curve.x, y: curve.y, lo: hi && lo, hi: lo && hi, dots: heldOut, smooth: !heldOut }];
  };
  const marks = () => (run() ? run().state.warnings.filter((one) => one.step !== null).map((one) => ({ x: one.step, strong: false, label: one.name, clock: run().state.clock })) : []);
  return { plot, chart: new Chart(plot, { title: "The figure that tells most", lines, marks, height: 236 }) };
}

function progress(state) {
  if (state.done === null && state.total === null) return el("p", { class: "steps" }, state.status.state === "file" ? "" : "No finished step");
  const done = state.done || 0;
  const text = state.total ? `${count(done)} of ${count(state.total)} steps` : `${count(done)} steps`;
  const clock = state.clock.y;
  const seconds = clock.length ? clock[clock.length - 1] : null;
  const left = state.status.state === "running" && seconds && done && state.total > done ? (seconds / done) * (state.total - done) : null;
  const bar = state.total
    ? el("progress", { max: state.total, value: Math.min(done, state.total), "aria-label": text })
    : null;
  return el("div", { class: "steps" }, bar, el("span", {}, text, seconds === null ? "" : ` \u00b7 ${duration(seconds)} in steps`, left === null ? "" : ` \u00b7 about ${duration(left)} left`));
}

function facts(state) {
  const started = state.events.find((event) => event.kind === "start");
  const found = [
    ...(state.what.start ? [["Started from", state.what.start]] : []),
    ...(started && started.time ? [["Began", moment(started.time)]] : []),
    ["Folder", state.path],
    ...(state.checkpoints.length ? [["Checkpoints", `${count(state.checkpoints.length)}, the newest of step ${count(state.checkpoints[state.checkpoints.length - 1])}`]] : []),
    ...(state.evidence.length ? [["Batches set aside, for sapwood replay", state.evidence.join(", ")]] : []),
    ...state.facts,
  ];
  return el("details", { class: "facts" }, el("summary", {}, "Where and with what"), el("dl", {}, found.map(([label, text]) => [el("dt", {}, plain(label, 60)), el("dd", {}, plain(text, 2000))])));
}

// plot: the chart of a run that is shown alone; its name stands above the card then.
function card(app, run, plot) {
  const state = run.state;
  const what = [state.what.algorithm, state.what.model, state.what.world].filter(Boolean);
  const warned = state.counts.warnings;
  const text = el("div", { class: "card-text" },
    plot ? null : el("header", {}, el("span", { class: "swatch big" }), el("h2", { class: "run-name" }, plain(run.label, 160)), pill(state.status)),
    what.length ? el("p", { class: "what" }, what.map((word, i) => [i ? el("span", { class: "dot-between" }, " \u00b7 ") : null, plain(word, 120)])) : null,
    progress(state),
    el("p", { class: "status-detail" }, plot ? [pill(state.status), " "] : null, sentence(plain(state.status.detail, 500))),
    headline(state),
    plot ? null : spark(run),
    warned ? el("p", { class: "alert" }, el("span", { "aria-hidden": "true" }, "\u25b2 "), `${count(warned)} warning${warned === 1 ? "" : "s"}. `, el("a", { anchor: "timeline" }, "Read them with their remedies")) : null,
    facts(state),
    problems(app, run));
  return el("article", { class: `card run-${run.colour}`, "aria-label": plain(run.label, 100) }, text,
    plot && state.curves.length ? el("div", { class: "card-picture" }, el("h3", { class: "measure" }, plain(shownTitle(run), 80)), plot) : null);
}

const sentence = (text) => text.slice(0, 1).toUpperCase() + text.slice(1);

function problems(app, run) {
  const all = [...run.state.problems, ...run.problems];
  if (!all.length) return null;
  return el("details", { class: "problems", open: all.length < 4 }, el("summary", {}, `${count(all.length)} thing${all.length === 1 ? "" : "s"} in the folder could not be read, or not whole`),
    el("ul", {}, all.slice(0, 200).map((sentence) => el("li", {}, plain(sentence, 600)))));
}

function table(app, runs) {
  const rows = runs.map((run) => {
    const { headline: head, status, done, total } = run.state;
    const difference = head && head.difference;
    const [word, kind] = head ? verdict(difference, head.more) : ["", ""];
    const clock = run.state.clock.y;
    const speed = run.state.curves.find((curve) => curve.name === "tokens_per_second");
    return el("tr", { class: `run-${run.colour}` },
      el("th", { scope: "row" }, el("span", { class: "swatch" }), plain(run.label, 80)),
      el("td", {}, pill(status)),
      el("td", {}, plain(run.state.what.algorithm, 40) || NONE),
      el("td", { class: "number" }, done === null ? NONE : `${count(done)}${total ? ` / ${count(total)}` : ""}`),
      el("td", {}, head ? plain(head.title, 60) : NONE),
      ...["base", "best", "last"].map((key) => el("td", { class: "number" }, head && head[key] ? num(head[key].value) : NONE)),
      el("td", { class: `number ${kind}` }, difference ? [signed(difference.mean), el("small", {}, ` ${word}`)] : head && head.base && head.last ? signed(head.last.value - head.base.value) : NONE),
      el("td", { class: "number" }, clock.length ? duration(clock[clock.length - 1]) : NONE),
      el("td", { class: "number" }, speed ? num(median(speed.y), 3) : NONE));
  });
  const heads = ["Run", "Status", "Algorithm", "Steps", "Held-out figure", "Before", "Best", "Last", "Trained \u2212 base", "Time in steps", "Tokens / s"];
  return el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Runs side by side" }, el("table", { class: "side" }, el("thead", {}, el("tr", {}, heads.map((text, i) => el("th", { scope: "col", class: i === 3 || i > 4 ? "number" : "" }, text)))), el("tbody", {}, rows)));
}

function median(values) {
  const known = values.filter((value) => value !== null).sort((a, b) => a - b);
  return known.length ? known[known.length >> 1] : null;
}

export class Summary {
  constructor(app) {
    this.app = app;
    this.body = $("#summary-body");
    this.alone = app.runs.length === 1 ? picture(app) : null;
    this.update();
  }

  update() {
    const runs = this.app.runs.filter((run) => run.state);
    const open = new Set([...this.body.querySelectorAll("details[open]")].map((node) => node.dataset.key));
    const closed = new Set([...this.body.querySelectorAll("details:not([open])")].map((node) => node.dataset.key));
    const active = document.activeElement;
    const focused = active && this.body.contains(active) ? active.parentNode.dataset.key : null;
    replace(this.body, runs.length > 1 && !this.app.report.building ? table(this.app, runs) : null, el("div", { class: "cards" }, runs.map((run) => card(this.app, run, this.alone && this.alone.plot))));
    if (this.alone) this.alone.chart.refresh();
    this.body.querySelectorAll("article").forEach((article, i) => {
      for (const node of article.querySelectorAll("details")) {
        node.dataset.key = `${i}-${node.className}`;
        if (open.has(node.dataset.key)) node.open = true;
        if (closed.has(node.dataset.key)) node.open = false;
        if (focused === node.dataset.key) $("summary", node).focus({ preventScroll: true });
      }
    });
    if (this.alone && active === this.alone.plot) active.focus({ preventScroll: true });
    const single = runs.length === 1 ? plain(runs[0].label, 120) : `${runs.length} ${this.app.report.building ? "files" : "runs"} side by side`;
    $("#summary-title").textContent = runs.length ? single : "Report";
    document.title = `${runs.length ? single : "Report"} \u00b7 Sapwood`;
  }
}
