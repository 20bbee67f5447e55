// Every metric of every run, in groups, runs overlaid.

import { $, chip, el, labelled, segmented } from "./dom.js";
import { NONE, num } from "./format.js";
import { Chart, redraw, view } from "./chart.js";
import { plain } from "./text.js";

const BOUNDS = new Map([["eval/return", ["eval/low", "eval/high"]]]);
const HIDDEN = new Set(["eval/low", "eval/high"]);
const bare = (name) => (name.startsWith("eval/") ? name.slice(5) : name);

// Charts by name of the metric without "eval/"; the held-out curve of a metric is drawn with it.
function panels(app) {
  const found = new Map();
  for (const run of app.runs) {
    for (const curve of run.state ? run.state.curves : []) {
      if (HIDDEN.has(curve.name) || /^eval\/.*\/(lo|hi)$/.test(curve.name)) continue;
      const key = `${curve.group}\n${bare(curve.name)}`;
      const panel = found.get(key) || { key, name: bare(curve.name), group: curve.group, title: curve.title, rank: curve.rank, unit: curve.unit, meaning: curve.meaning, healthy: curve.healthy, heldOut: true };
      if (!curve.name.startsWith("eval/")) panel.heldOut = false;
      found.set(key, panel);
    }
  }
  const order = (a, b) => a.rank - b.rank || a.name.localeCompare(b.name);
  return [...found.values()].sort(order);
}

function linesOf(app, panel) {
  const lines = [];
  for (const run of app.runs) {
    if (!run.shown || !run.state) continue;
    const curves = new Map(run.state.curves.map((curve) => [curve.name, curve]));
    for (const name of [panel.name, `eval/${panel.name}`]) {
      const curve = curves.get(name);
      if (!curve || curve.group !== panel.group) continue;
      const heldOut = name.startsWith("eval/");
      const [low, high] = (BOUNDS.get(name) || [`${name}/lo`, `${name}/hi`]).map((bound) => curves.get(bound));
      lines.push({
        run: run.number,
        colour: run.colour,
        label: `${run.label}${heldOut && !panel.heldOut ? ", held out" : ""}`,
        clock: run.state.clock,
        x: curve.x,
        y: curve.y,
        gaps: curve.gaps,
        lo: low && high ? matched(curve.x, low) : null,
        hi: low && high ? matched(curve.x, high) : null,
        dots: heldOut,
        smooth: !heldOut,
      });
    }
  }
  return lines;
}

function matched(steps, curve) {
  const at = new Map(curve.x.map((step, i) => [step, curve.y[i]]));
  return steps.map((step) => at.get(step) ?? null);
}

const explained = (panel) => [panel.meaning, panel.healthy && `Healthy: ${panel.healthy}`].filter(Boolean).join(" ");

// Warnings of the runs that are shown; strong where they are about this metric.
function marksOf(app, panel) {
  const marks = [];
  for (const run of app.runs) {
    if (!run.shown || !run.state) continue;
    for (const warning of run.state.warnings) {
      if (warning.step === null) continue;
      const about = warning.metrics.some(([name]) => bare(name) === panel.name);
      marks.push({ x: warning.step, strong: about, label: `${warning.name} (${run.label})`, clock: run.state.clock });
    }
  }
  return marks.sort((a, b) => b.strong - a.strong);
}

export class Curves {
  constructor(app) {
    this.app = app;
    this.body = $("#curves-body");
    this.cards = new Map();
    this.groups = new Map();
    this.filter = "";
    this.body.append(this.toolbar());
    this.empty = el("p", { class: "nothing" }, "No metric has been recorded yet.");
    this.none = el("p", { class: "nothing", hidden: true }, "No metric has this in its name.");
    this.body.append(this.empty, this.none);
    this.update();
  }

  toolbar() {
    const slider = el("input", { type: "range", min: 0, max: 0.98, step: 0.02, value: view.smoothing });
    const shown = el("output", {}, view.smoothing.toFixed(2));
    slider.addEventListener("input", () => {
      view.smoothing = Number(slider.value);
      shown.textContent = view.smoothing.toFixed(2);
      redraw();
    });
    const find = el("input", { type: "search", placeholder: "loss, entropy \u2026", "aria-label": "Find a metric" });
    find.addEventListener("input", () => {
      this.filter = find.value.trim().toLowerCase();
      this.arrange();
    });
    const number = (label, key) => {
      const node = el("input", { type: "number", min: 0, step: 1, "aria-label": label, placeholder: key === "from" ? "first" : "last" });
      node.addEventListener("change", () => this.zoom(...(key === "from" ? [node.value, view.to] : [view.from, node.value])));
      return node;
    };
    this.from = number("From step", "from");
    this.to = number("To step", "to");
    this.reset = el("button", { type: "button", class: "quiet", hidden: true, click: () => this.zoom(null, null) }, "All steps");
    return el(
      "div",
      { class: "toolbar" },
      labelled("Smoothing", el("span", { class: "slider" }, slider, shown)),
      el("div", { class: "field" }, el("span", {}, "Horizontal axis"), segmented("Horizontal axis", [["step", "Steps"], ["time", "Time"]], view.axis, (axis) => { view.axis = axis; redraw(); })),
      el("div", { class: "field" }, el("span", {}, "Scale"), el("span", { class: "chips" },
        chip("Log scale", view.log, (on) => { view.log = on; redraw(); }),
        chip("Ignore outliers", view.outliers, (on) => { view.outliers = on; redraw(); }))),
      el("div", { class: "field" }, el("span", {}, "Steps"), el("span", { class: "range" }, this.from, "\u2013", this.to, this.reset)),
      labelled("Metric", find),
    );
  }

  zoom(from, to) {
    const value = (given) => (given === null || given === "" || !Number.isFinite(Number(given)) ? null : Number(given));
    view.from = value(from);
    view.to = value(to);
    this.from.value = view.from ?? "";
    this.to.value = view.to ?? "";
    this.reset.hidden = view.from === null && view.to === null;
    redraw();
  }

  // Cards for metrics that have appeared; those that are there stay as they are, and where they are.
  update() {
    const found = panels(this.app);
    this.empty.hidden = found.length > 0;
    for (const panel of found) if (!this.cards.has(panel.key)) this.add(panel);
    const named = new Map(found.map((panel) => [panel.key, panel]));
    for (const card of this.cards.values()) {
      const panel = named.get(card.panel.key) || card.panel; // a metric may first be measured on held-out tasks alone
      card.panel.heldOut = panel.heldOut;
      card.chart.refresh();
      card.value.textContent = this.latest(panel);
      card.held.hidden = !panel.heldOut;
      card.name.textContent = [plain(panel.heldOut ? `eval/${panel.name}` : panel.name, 120), panel.unit, this.gaps(panel)].filter(Boolean).join(" \u00b7 ");
    }
    this.arrange();
  }

  add(panel) {
    const value = el("span", { class: "latest" });
    const name = el("code", { class: "name" });
    const held = el("span", { class: "badge" }, "held out");
    const plot = el("div", {});
    const spec = {
      title: panel.title,
      lines: () => linesOf(this.app, panel),
      marks: () => marksOf(this.app, panel),
      zoom: (from, to) => this.zoom(from, to),
    };
    const enlarge = el("button", { type: "button", class: "icon", "aria-label": `Enlarge ${plain(panel.title, 80)}`, title: "Enlarge" }, "\u2922");
    const node = el(
      "figure",
      { class: "chart" },
      el("figcaption", { title: explained(panel) }, el("span", { class: "title" }, plain(panel.title, 120), " ", held), value, enlarge, name),
      plot,
    );
    const chart = new Chart(plot, spec);
    enlarge.addEventListener("click", () => this.enlarge(panel, spec));
    this.cards.set(panel.key, { node, chart, panel, value, name, held });
    this.section(panel.group).grid.append(node);
    const sorted = [...this.cards.values()].filter((card) => card.panel.group === panel.group);
    sorted.sort((a, b) => a.panel.rank - b.panel.rank || a.panel.name.localeCompare(b.panel.name));
    const next = sorted[sorted.findIndex((card) => card.node === node) + 1];
    if (next) next.node.before(node);
  }

  section(group) {
    if (!this.groups.has(group)) {
      const grid = el("div", { class: "charts" });
      const section = el("details", { class: "group", open: true }, el("summary", {}, el("h3", {}, group)), grid);
      this.groups.set(group, { section, grid });
      const order = this.app.report.groups;
      const after = [...this.groups.entries()].filter(([name]) => order.indexOf(name) > order.indexOf(group));
      after.sort((a, b) => order.indexOf(a[0]) - order.indexOf(b[0]));
      if (after.length) after[0][1].section.before(section);
      else this.body.append(section);
    }
    return this.groups.get(group);
  }

  latest(panel) {
    const lines = linesOf(this.app, panel);
    if (lines.length !== 1) return "";
    const last = lines[0].y.findLast((value) => value !== null);
    return last === undefined ? NONE : num(last);
  }

  // A loss that is not a number now and then is news.
  gaps(panel) {
    const times = linesOf(this.app, panel).reduce((sum, line) => sum + line.gaps, 0);
    return times ? `${times.toLocaleString("en")} not finite` : "";
  }

  arrange() {
    let any = false;
    for (const { section, grid } of this.groups.values()) {
      let seen = 0;
      for (const node of grid.children) {
        const card = [...this.cards.values()].find((one) => one.node === node);
        const match = !this.filter || `${card.panel.name} ${card.panel.title}`.toLowerCase().includes(this.filter);
        node.hidden = !match;
        seen += match;
      }
      section.hidden = !seen;
      any = any || seen > 0;
    }
    this.none.hidden = any || !this.cards.size;
  }

  enlarge(panel, spec) {
    const plot = el("div", {});
    const close = el("button", { type: "button", class: "quiet" }, "Close");
    const legend = el("div", { class: "legend" }, linesOf(this.app, panel).map((line) =>
      el("span", { class: `run-${line.colour}` }, el("span", { class: line.dots ? "swatch hollow" : "swatch" }), plain(line.label, 80))));
    const dialog = el("dialog", { class: "large", "aria-label": plain(panel.title, 120) },
      el("header", {}, el("h3", {}, plain(panel.title, 120)), el("code", {}, plain(panel.name, 200)), close), plot, legend,
      panel.meaning ? el("p", { class: "meaning" }, panel.meaning, panel.healthy ? [" ", el("b", {}, "Healthy: "), panel.healthy] : null) : null);
    document.body.append(dialog);
    const chart = new Chart(plot, { ...spec, height: Math.max(260, Math.min(640, window.innerHeight - 240)) });
    const tip = $("#tip"); // a modal dialog covers everything outside it
    close.addEventListener("click", () => dialog.close());
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
    dialog.addEventListener("close", () => {
      chart.leave();
      chart.remove();
      document.body.append(tip);
      dialog.remove();
    });
    dialog.append(tip);
    dialog.showModal();
    plot.focus();
  }
}
