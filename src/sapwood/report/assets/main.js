// The whole page: its parts, its runs, its colours, and news where a server shows a run that goes on.

import { $, announce, el, replace } from "./dom.js";
import { redraw } from "./chart.js";
import { Curves } from "./curves.js";
import { Days } from "./days.js";
import { Evaluation } from "./evaluation.js";
import { moment } from "./format.js";
import { Recipe } from "./recipe.js";
import { Samples } from "./samples.js";
import { Embedded, openStore } from "./store.js";
import { Summary, pill } from "./summary.js";
import { Timeline } from "./timeline.js";
import { plain } from "./text.js";

const COLOURS = 8;
const THEMES = { auto: "Colours: as the system", light: "Colours: light", dark: "Colours: dark" };

function remembered(key) {
  try {
    return localStorage.getItem(key);
  } catch {
    return null; // a page from disk may have no storage
  }
}

function remember(key, value) {
  try {
    localStorage.setItem(key, value);
  } catch {
    // it is remembered for this page only
  }
}

function themes() {
  const button = $("#theme");
  const use = (theme) => {
    document.documentElement.dataset.theme = theme;
    button.textContent = { auto: "Auto", light: "Light", dark: "Dark" }[theme];
    button.setAttribute("aria-label", THEMES[theme]);
    button.title = THEMES[theme];
  };
  const names = Object.keys(THEMES);
  const stored = remembered("sapwood-theme");
  let theme = names.includes(stored) ? stored : "auto";
  use(theme);
  button.addEventListener("click", () => {
    theme = names[(names.indexOf(theme) + 1) % names.length];
    remember("sapwood-theme", theme);
    use(theme);
  });
}

function sections() {
  const nav = $("#sections");
  const links = new Map();
  for (const section of document.querySelectorAll("main > section:not([hidden])")) {
    const name = section.id === "summary" ? "Summary" : $("h2", section).textContent;
    const link = el("a", { anchor: section.id }, name);
    links.set(section, link);
    nav.append(link);
  }
  if (typeof IntersectionObserver === "undefined") return;
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      for (const [section, link] of links) {
        if (section === entry.target) link.setAttribute("aria-current", "true");
        else link.removeAttribute("aria-current");
      }
      const link = links.get(entry.target);
      nav.scrollTo({ left: link.offsetLeft - nav.clientWidth / 2 + link.clientWidth / 2 });
    }
  }, { rootMargin: "-30% 0px -65% 0px" });
  for (const section of links.keys()) seen.observe(section);
}

// Runs by name; by path where two have the same name.
function label(runs) {
  const names = new Map();
  for (const run of runs) if (run.state) names.set(run.state.name, (names.get(run.state.name) || 0) + 1);
  for (const run of runs) if (run.state) run.label = names.get(run.state.name) > 1 ? run.state.path : run.state.name;
}

class App {
  constructor() {
    this.store = openStore();
    this.report = this.store.report;
    this.loading = true;
    this.runs = Array.from({ length: this.report.count }, (_, number) => ({ number, colour: number % COLOURS, label: `run ${number + 1}`, shown: true, state: this.report.runs[number] || null, problems: [] }));
    label(this.runs);
    themes();
    // Trajectory files of buildings have days, and nothing of what a run has.
    const absent = this.report.building ? ["curves", "evaluation", "timeline", "recipe"] : ["days"];
    for (const id of absent) $(`#${id}`).hidden = true;
    sections();
    $("#print").addEventListener("click", () => window.print());
    const summary = new Summary(this);
    const curves = new Curves(this);
    const evaluation = new Evaluation(this);
    const timeline = new Timeline(this);
    this.samples = new Samples(this);
    this.views = [summary, new Days(this), curves, evaluation, timeline, new Recipe(this)];
    this.bar();
    this.foot();
    if (this.store instanceof Embedded) this.load();
    else this.watch();
  }

  async load() {
    // The samples stand after this script; the rest of the page is drawn first.
    if (document.readyState === "loading") await new Promise((resolve) => document.addEventListener("DOMContentLoaded", resolve, { once: true }));
    try {
      await this.store.entries((entries) => {
        this.loading = false;
        this.samples.replace(0, [], entries);
      });
    } catch (error) {
      this.loading = false;
      this.samples.refresh();
      replace($("#samples-body"), el("p", { class: "notice bad" }, `The samples can't be read: ${plain(error.message, 300)}`));
    }
    document.documentElement.dataset.ready = "true";
  }

  watch() {
    const live = $("#live");
    live.hidden = false;
    live.textContent = "Connecting";
    this.store.watch({
      link: (ok) => {
        const words = ok ? "Live" : "No answer; shown is what was there";
        live.classList.toggle("lost", !ok);
        if (live.textContent !== words) live.textContent = words;
        if (ok) live.title = `Read ${moment(this.report.made)}`;
      },
      runs: (changed) => {
        for (const number of changed) this.runs[number].state = this.report.runs[number];
        label(this.runs);
        for (const view of this.views) view.update();
        this.loading = changed.some((number) => this.runs[number].state.samples.files.length > 0) && !this.samples.all.length;
        this.samples.refresh(true);
        this.bar();
        this.foot();
        document.documentElement.dataset.ready = "true";
      },
      samples: (run, files, entries) => this.samples.replace(run, files, entries),
      problems: (run, sentences) => {
        const news = sentences.filter((sentence) => !this.runs[run].problems.includes(sentence));
        if (!news.length) return;
        this.runs[run].problems.push(...news);
        this.views[0].update();
      },
    });
  }

  // Which runs are shown; everything but the summary and the recipe follows.
  bar() {
    const bar = $("#runbar");
    bar.hidden = this.runs.length < 2;
    if (bar.hidden) return;
    const told = JSON.stringify(this.runs.map((run) => [run.label, run.state && run.state.status.state]));
    if (told === this.told) return;
    this.told = told;
    const focus = bar.contains(document.activeElement) ? [...bar.children].indexOf(document.activeElement) : -1;
    replace(bar, this.runs.map((run) => {
      const node = el("button", { type: "button", class: `run run-${run.colour}`, "aria-pressed": String(run.shown), title: plain(run.state ? run.state.path : "", 300) },
        el("span", { class: "swatch" }), el("span", { class: "run-label" }, plain(run.label, 60)), run.state && run.state.status.state !== "finished" ? pill(run.state.status) : null);
      node.addEventListener("click", () => {
        run.shown = !run.shown;
        node.setAttribute("aria-pressed", String(run.shown));
        announce(`${plain(run.label, 60)} ${run.shown ? "shown" : "hidden"}`);
        for (const view of this.views) view.update();
        this.samples.refresh(true);
      });
      return node;
    }));
    if (focus >= 0 && bar.children[focus]) bar.children[focus].focus();
  }

  foot() {
    const how = this.report.live ? "Read live" : "Written";
    replace($("#foot"), el("p", {}, `${how} by Sapwood ${plain(this.report.sapwood, 20)}, ${moment(this.report.made)}. `,
      "Curves of more than 2,000 points keep the least and the greatest value of every stretch; numbers are rounded to seven digits."));
  }
}

new App();
redraw();
