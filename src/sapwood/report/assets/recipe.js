// What the runs were told to do, and in what they differ.

import { $, chip, el, replace } from "./dom.js";
import { fill, plain } from "./text.js";

const ABSENT = "\u2013";

function value(text) {
  if (text === null || text === undefined) return el("span", { class: "absent" }, ABSENT);
  return fill(el("code", { dir: "auto" }), text.length > 600 ? `${text.slice(0, 600)}\u2026` : text);
}

// key -> [value of each run]
function columns(runs, pick) {
  const rows = new Map();
  runs.forEach((run, i) => {
    for (const [key, text] of pick(run)) {
      if (!rows.has(key)) rows.set(key, new Array(runs.length).fill(null));
      rows.get(key)[i] = text;
    }
  });
  return rows;
}

const differs = (values) => values.some((one) => one !== values[0]);

function compared(runs, rows, all, label) {
  const kept = [...rows].filter(([, values]) => all || differs(values));
  if (!kept.length) return el("p", { class: "nothing" }, "These runs have the same.");
  return el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": label }, el("table", { class: "recipe" },
    el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Option"), runs.map((run) => el("th", { scope: "col", class: `run-${run.colour}` }, el("span", { class: "swatch" }), plain(run.label, 80))))),
    el("tbody", {}, kept.map(([key, values]) => el("tr", { class: differs(values) ? "differs" : "" }, el("th", { scope: "row" }, plain(key, 200)), values.map((text) => el("td", {}, value(text))))))));
}

// Sections of a single recipe, folded; options that differ from the default carry it beside them.
function sections(recipe) {
  const found = new Map();
  for (const row of recipe) {
    const name = row[0].split(".")[0];
    found.set(name, [...(found.get(name) || []), row]);
  }
  return [...found].map(([name, rows]) => {
    const changed = rows.filter((row) => row[2] !== null).length;
    return el("details", { class: "section" },
      el("summary", {}, el("b", {}, plain(name, 80)), el("small", {}, rows.length === 1 && rows[0][0] === name ? ` ${plain(rows[0][1], 80)}` : ` ${rows.length} options${changed ? `, ${changed} not at the default` : ""}`)),
      el("table", { class: "recipe" }, el("tbody", {}, rows.map(([key, text, usual]) =>
        el("tr", { class: usual === null ? "" : "differs" }, el("th", { scope: "row" }, plain(key, 200)), el("td", {}, value(text), usual === null ? null : el("small", { class: "usual" }, "default ", value(usual))))))));
  });
}

export class Recipe {
  constructor(app) {
    this.app = app;
    this.body = $("#recipe-body");
    this.all = false;
    this.told = "";
    this.update();
  }

  update() {
    const runs = this.app.runs.filter((run) => run.state && run.state.recipe.length);
    const told = JSON.stringify([this.all, runs.map((run) => [run.number, run.state.recipe, run.state.environment])]);
    if (told === this.told) return;
    this.told = told;
    if (!runs.length) {
      replace(this.body, el("p", { class: "nothing" }, "No recipe is there."));
      return;
    }
    if (runs.length === 1) this.single(runs[0]);
    else this.several(runs);
  }

  single(run) {
    const changed = run.state.recipe.filter((row) => row[2] !== null);
    const short = changed.length
      ? el("table", { class: "recipe" }, el("tbody", {}, changed.map(([key, text, usual]) =>
          el("tr", {}, el("th", { scope: "row" }, plain(key, 200)), el("td", {}, value(text), el("small", { class: "usual" }, "default ", value(usual)))))))
      : el("p", { class: "nothing" }, "Every option whose default is known has it.");
    replace(this.body, el("div", { class: "recipe-columns" },
      el("div", {}, el("h3", {}, "Not at the default"), short),
      el("div", {}, el("h3", {}, "The whole recipe"), sections(run.state.recipe), this.environment([run]))));
  }

  several(runs) {
    const every = chip("Show options that are the same", this.all, (on) => {
      this.all = on;
      this.update();
      $(".chip", this.body).focus();
    });
    replace(this.body, el("div", { class: "toolbar" }, every),
      compared(runs, columns(runs, (run) => run.state.recipe), this.all, "Recipes side by side"), this.environment(runs));
  }

  environment(runs) {
    const rows = columns(runs, (run) => run.state.environment);
    if (!rows.size) return null;
    const summary = el("summary", {}, el("b", {}, "Environment"), el("small", {}, runs.length > 1 ? " versions and hardware, where they differ" : " versions and hardware"));
    return el("details", { class: "section" }, summary, compared(runs, rows, runs.length === 1 || this.all, "Environments side by side"));
  }
}
