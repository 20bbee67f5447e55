// What the guards found and what happened by the clock, with what usually helps.

import { $, chip, el, replace, svg } from "./dom.js";
import { count, moment, num, tickLabel, ticks } from "./format.js";
import { passage, plain } from "./text.js";

const SHOWN = 100;

// Warnings of one name in a row, which a guard repeats while its reason lasts, are one entry.
function entries(runs) {
  const found = [];
  for (const run of runs) {
    let open = null;
    for (const warning of run.state.warnings) {
      if (open && open.name === warning.name) {
        open.steps.push(warning.step);
        open.message = warning.message;
        open.metrics = warning.metrics;
      } else {
        open = { run, kind: "warning", name: warning.name, message: warning.message, remedies: warning.remedies, metrics: warning.metrics, step: warning.step, steps: [warning.step], time: "" };
        found.push(open);
      }
    }
    for (const event of run.state.events)
      found.push({ run, kind: "event", name: event.kind, message: event.message, remedies: [], metrics: [], step: event.step, steps: [event.step], time: event.time });
  }
  return found.sort((a, b) => (a.step ?? -1) - (b.step ?? -1) || (a.kind === "warning") - (b.kind === "warning"));
}

function steps(list) {
  const known = list.filter((step) => step !== null);
  if (!known.length) return "no step";
  if (known.length === 1) return `step ${count(known[0])}`;
  return `${count(known.length)} times, steps ${count(known[0])} to ${count(known[known.length - 1])}`;
}

const SIGNS = { warning: "\u25b2", checkpoint: "\u25c6", resume: "\u21bb", start: "\u25b6", finish: "\u2713", stop: "\u25a0" };

function item(entry, several) {
  const sign = SIGNS[entry.kind === "warning" ? "warning" : entry.name] || "\u2022";
  return el("li", { class: `entry ${entry.kind} run-${entry.run.colour}` },
    el("span", { class: "sign", "aria-hidden": "true" }, sign),
    el("div", {},
      el("p", { class: "entry-head" }, el("b", {}, plain(entry.name.replace(/_/g, " "), 80)), el("span", {}, ` ${steps(entry.steps)}`),
        several ? el("span", { class: "of-run" }, el("span", { class: "swatch" }), plain(entry.run.label, 60)) : null,
        entry.time ? el("time", {}, moment(plain(entry.time, 40))) : null),
      entry.message ? passage(entry.message, 600, { class: "passage message" }) : null,
      entry.metrics.length ? el("p", { class: "measured" }, entry.metrics.slice(0, 12).map(([name, value]) => el("span", {}, el("code", {}, plain(name, 80)), ` ${num(value)}`))) : null,
      entry.remedies.length ? el("details", { open: true }, el("summary", {}, "What usually helps"), el("ul", {}, entry.remedies.map((text) => el("li", {}, plain(text, 600))))) : null));
}

// A lane a run: where on its steps something was found or happened.
function strip(runs, found, room) {
  const last = Math.max(1, ...runs.map((run) => Math.max(run.state.total || 0, run.state.done || 0)));
  const width = Math.max(520, room);
  const at = (step) => 10 + (Math.max(0, step) / last) * (width - 20);
  const lane = 26;
  const height = runs.length * lane + 22;
  const values = ticks(0, last, 8);
  const parts = values.map((value) => svg("text", { class: "tick", x: at(value), y: height - 5, "text-anchor": "middle" }, tickLabel(value, values)));
  runs.forEach((run, row) => {
    const y = row * lane + lane / 2;
    const group = svg("g", { class: `run-${run.colour}` }, svg("line", { class: "lane", x1: at(0), x2: at(run.state.done || 0), y1: y, y2: y }));
    const taken = new Set();
    for (const entry of found.filter((one) => one.run === run))
      for (const step of entry.steps) {
        const x = Math.round(at(step ?? 0));
        const key = `${entry.kind}${x}`;
        if (taken.has(key)) continue;
        taken.add(key);
        const title = svg("title", {}, `${plain(entry.name, 60)}, step ${step}`);
        group.append(entry.kind === "warning" ? svg("path", { class: "mark strong", d: `M${x - 5} ${y + 8}h10l-5 -9z` }, title)
          : svg("rect", { class: "happening", x: x - 2.5, y: y - 9, width: 5, height: 9, rx: 1 }, title));
      }
    parts.push(group);
  });
  return el("div", { class: "scroll" }, svg("svg", { class: "strip", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Warnings and events over the steps; the list below has them all" }, parts));
}

export class Timeline {
  constructor(app) {
    this.app = app;
    this.body = $("#timeline-body");
    this.hidden = new Set(["checkpoint"]);
    this.most = SHOWN;
    this.told = "";
    this.update();
  }

  update() {
    const runs = this.app.runs.filter((run) => run.state && run.shown);
    const told = JSON.stringify([this.most, [...this.hidden], runs.map((run) => [run.number, run.state.done, run.state.warnings, run.state.events])]);
    if (told === this.told) return;
    this.told = told;
    const found = entries(runs);
    if (!found.length) {
      replace(this.body, el("p", { class: "nothing" }, "No warning and no event has been recorded."));
      return;
    }
    const kinds = new Map();
    for (const entry of found) kinds.set(entry.name, (kinds.get(entry.name) || 0) + entry.steps.length);
    const focus = document.activeElement && this.body.contains(document.activeElement) ? document.activeElement.dataset.kind : undefined;
    const chips = [...kinds].slice(0, 30).map(([name, times]) => {
      const node = chip(`${plain(name.replace(/_/g, " "), 40)} ${count(times)}`, !this.hidden.has(name), (on) => {
        if (on) this.hidden.delete(name);
        else this.hidden.add(name);
        this.update();
      });
      node.dataset.kind = name;
      return node;
    });
    const wanted = found.filter((entry) => !this.hidden.has(entry.name));
    const more = wanted.length - this.most;
    replace(this.body, strip(runs, found, this.body.clientWidth), el("div", { class: "toolbar" }, el("span", { class: "chips", role: "group", "aria-label": "Kinds shown" }, chips)),
      el("ol", { class: "entries" }, wanted.slice(0, this.most).map((entry) => item(entry, runs.length > 1))),
      more > 0 ? el("button", { type: "button", class: "more", click: () => { this.most += 200; this.update(); } }, `Show more: ${count(more)} are hidden`) : null,
      runs.map((run) => run.state.counts.warnings > run.state.warnings.length || run.state.counts.events > run.state.events.length
        ? el("p", { class: "nothing" }, `${plain(run.label, 80)}: only the last ${count(run.state.warnings.length)} of ${count(run.state.counts.warnings)} warnings and ${count(run.state.events.length)} of ${count(run.state.counts.events)} events are in this page.`) : null));
    if (focus !== undefined) [...this.body.querySelectorAll(".chip")].find((node) => node.dataset.kind === focus)?.focus();
  }
}
