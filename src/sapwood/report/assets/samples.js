// The browser of trajectories: a list to filter, sort and search, and beside it what is chosen.

import { $, announce, chip, debounce, el, labelled, replace, segmented, select } from "./dom.js";
import { NONE, count, num, signed } from "./format.js";
import { VirtualList } from "./list.js";
import { chunkOf } from "./store.js";
import { COLOURS, columnsOf, legend, scaleOf } from "./tokens.js";
import { FLAGS, badges, largest, rewardText, trajectoryNode, where } from "./trajectory.js";
import { plain } from "./text.js";

const ORDERS = [
  ["step", "First steps first"],
  ["latest", "Last steps first"],
  ["best", "Best reward first"],
  ["worst", "Worst reward first"],
  ["long", "Longest replies first"],
  ["task", "By task"],
];
const low = (value) => (value === null ? -Infinity : value);
const COMPARE = {
  step: (a, b) => a.step - b.step || (a.kind < b.kind ? -1 : a.kind > b.kind ? 1 : 0),
  latest: (a, b) => b.step - a.step,
  best: (a, b) => low(b.reward) - low(a.reward),
  worst: (a, b) => (a.reward ?? Infinity) - (b.reward ?? Infinity),
  long: (a, b) => b.tokens - a.tokens,
  task: (a, b) => (a.task < b.task ? -1 : a.task > b.task ? 1 : a.step - b.step),
};
const inOrder = (a, b) => a.run - b.run || (a.file < b.file ? -1 : a.file > b.file ? 1 : a.pos - b.pos);

export class Samples {
  constructor(app) {
    this.app = app;
    this.body = $("#samples-body");
    this.all = [];
    this.groups = new Map();
    this.state = { mode: "browse", kind: "all", order: "step", flags: new Set(), from: null, to: null, task: "", text: "", change: "all", by: null };
    this.pair = { a: null, b: null };
    this.chosen = [];
    this.found = null;
    this.searching = 0;
    this.build();
    this.refresh();
  }

  // ---- what is there -----------------------------------------------------------------------------------------

  // What these files of a run held before gives way to the entries, in one go, so that a reader's place is kept.
  replace(run, files, entries) {
    const names = new Set(files);
    const kept = files.length ? this.all.filter((entry) => entry.run !== run || !names.has(entry.file)) : this.all;
    this.all = kept.concat(entries);
    this.changed();
  }

  changed() {
    this.groups = new Map();
    for (const entry of this.all) {
      const key = this.groupKey(entry);
      if (key === null) continue;
      if (!this.groups.has(key)) this.groups.set(key, []);
      this.groups.get(key).push(entry);
    }
    this.choices();
    this.refresh(true);
    if (this.state.text) this.search();
    // Something is open from the start; nothing is taken from a reader who has chosen.
    if (this.list.selected < 0 && this.list.items.length && this.list.wanted === undefined && this.state.mode === "browse") {
      this.quiet = true;
      this.list.select(0, true);
    }
  }

  groupKey(entry) {
    return entry.group === null ? null : `${entry.run}/${entry.file}/${entry.group}`;
  }

  // ---- the page ----------------------------------------------------------------------------------------------

  build() {
    this.list = new VirtualList({
      label: "Trajectories",
      height: 66,
      key: (item) => item.id,
      row: (item) => (this.state.mode === "browse" ? this.row(item) : this.pairRow(item)),
      open: (item) => this.open(item),
      leave: () => this.detail.focus(),
    });
    this.count = el("p", { class: "counted", "aria-live": "polite" });
    this.status = el("p", { class: "searching", role: "status" });
    this.left = el("div", {});
    this.detail = el("div", { class: "detail", tabindex: -1, role: "region", "aria-label": "The chosen trajectory" });
    this.detail.addEventListener("keydown", (event) => this.keys(event));
    this.browse = this.browseTools();
    this.compare = el("div", { class: "toolbar", hidden: true });
    this.empty = el("p", { class: "nothing" }, "No trajectory has been kept yet (samples/ is empty; the recipe's samples.every says how often they are).");
    this.whole = el("div", {},
      el("div", { class: "toolbar modes" }, segmented("What to do", [["browse", "Browse"], ["compare", "Compare on the same task"]], "browse", (mode) => this.mode(mode)), this.status),
      this.browse, this.compare, this.left,
      el("div", { class: "panes" }, el("div", { class: "pane" }, this.count, this.list.node), this.detail));
    this.body.append(this.empty, this.whole);
    this.prompt();
  }

  prompt() {
    replace(this.detail, el("p", { class: "nothing" }, "Choose a trajectory in the list: with the mouse, or with the arrow keys. Enter moves here, Escape goes back."));
  }

  browseTools() {
    const flags = FLAGS.map(([bit, , many]) => {
      const node = chip(many, false, (on) => {
        if (on) this.state.flags.add(bit);
        else this.state.flags.delete(bit);
        this.refresh();
      });
      node.dataset.flag = bit;
      return node;
    });
    this.order = select("Order", ORDERS, "step", (order) => this.setOrder(order));
    const quick = [["best", "Best"], ["worst", "Worst"]].map(([order, text]) => {
      const node = chip(text, false, (on) => this.setOrder(on ? order : "step"));
      node.dataset.order = order;
      return node;
    });
    const task = el("input", { type: "search", placeholder: "part of its id", "aria-label": "Task" });
    task.addEventListener("input", debounce(120, () => {
      this.state.task = task.value.trim().toLowerCase();
      this.refresh();
    }));
    const text = el("input", { type: "search", placeholder: "in prompts and replies", "aria-label": "Text" });
    text.addEventListener("input", debounce(250, () => {
      this.state.text = text.value.trim().toLowerCase();
      this.search();
    }));
    const step = (label, key) => {
      const node = el("input", { type: "number", min: 0, step: 1, "aria-label": label, placeholder: key === "from" ? "first" : "last" });
      node.addEventListener("input", debounce(150, () => {
        this.state[key] = node.value === "" ? null : Number(node.value);
        this.refresh();
      }));
      return node;
    };
    return el("div", { class: "toolbar" },
      labelled("From", select("Kind", [["all", "Everything"], ["step", "Learnt from"], ["eval", "Held out"]], "all", (kind) => { this.state.kind = kind; this.refresh(); })),
      el("div", { class: "field" }, el("span", {}, "Steps"), el("span", { class: "range" }, step("From step", "from"), "\u2013", step("To step", "to"))),
      labelled("Task", task), labelled("Text", text), labelled("Order", this.order),
      el("div", { class: "field" }, el("span", {}, "Show"), el("span", { class: "chips", role: "group", "aria-label": "Show only" }, quick, flags)));
  }

  setOrder(order) {
    this.state.order = order;
    this.order.value = order;
    for (const node of this.browse.querySelectorAll("[data-order]")) node.setAttribute("aria-pressed", String(node.dataset.order === order));
    this.refresh();
  }

  mode(mode) {
    this.state.mode = mode;
    this.browse.hidden = mode !== "browse";
    this.compare.hidden = mode !== "compare";
    this.chosen = [];
    this.list.wanted = undefined;
    this.list.selected = -1;
    this.prompt();
    this.choices();
    this.refresh();
  }

  // ---- the list ----------------------------------------------------------------------------------------------

  row(entry) {
    const several = this.app.runs.length > 1;
    return el("div", { class: `row run-${this.app.runs[entry.run].colour}` },
      el("span", { class: `worth ${entry.reward < 0 ? "below" : "above"}` }, rewardText(entry)),
      el("span", { class: "row-task" }, several ? el("span", { class: "swatch" }) : null, plain(entry.task, 120) || "no task"),
      el("span", { class: "row-place" }, entry.kind === "eval" ? `held out \u00b7 ${count(entry.step)}` : entry.kind === "file" && !entry.step ? "" : `step ${count(entry.step)}`),
      el("span", { class: "row-text", dir: "auto" }, badges(entry.flags), plain(entry.snippet, 120) || el("i", {}, "empty reply")));
  }

  matches(entry) {
    const { kind, flags, from, to, task } = this.state;
    if (!this.app.runs[entry.run].shown) return false;
    if (kind !== "all" && entry.kind !== kind && entry.kind !== "file") return false;
    if (from !== null && entry.step < from) return false;
    if (to !== null && entry.step > to) return false;
    for (const bit of flags) if (!(entry.flags & bit)) return false;
    if (task && !entry.task.toLowerCase().includes(task)) return false;
    return !this.found || this.found.has(entry.id);
  }

  refresh(keepPlace = false) {
    this.empty.hidden = this.all.length > 0 || this.app.loading;
    this.whole.hidden = this.all.length === 0;
    for (const node of this.browse.querySelectorAll("[data-flag]")) {
      const bit = Number(node.dataset.flag);
      const times = this.all.reduce((sum, entry) => sum + ((entry.flags & bit) !== 0 && this.app.runs[entry.run].shown), 0);
      node.textContent = `${FLAGS.find((flag) => flag[0] === bit)[2]} ${count(times)}`;
      node.disabled = times === 0 && node.getAttribute("aria-pressed") !== "true";
    }
    const items = this.state.mode === "browse" ? this.browsed() : this.pairs();
    this.list.set(items, keepPlace);
    this.tellLeft();
  }

  browsed() {
    const items = this.all.filter((entry) => this.matches(entry));
    const order = COMPARE[this.state.order];
    items.sort((a, b) => order(a, b) || inOrder(a, b));
    this.count.textContent = `${count(items.length)} of ${count(this.all.length)} trajectories`;
    return items;
  }

  tellLeft() {
    const sentences = this.app.runs.filter((run) => run.state).flatMap((run) => {
      const label = this.app.runs.length > 1 ? `${plain(run.label, 80)}: ` : "";
      const hidden = run.state.samples && run.state.samples.hidden;
      return [run.state.left_out && `${label}${plain(run.state.left_out, 400)}`, hidden && `${label}${count(hidden)} files of samples are too many to list; they are spread evenly over the steps.`];
    });
    replace(this.left, sentences.filter(Boolean).map((sentence) => el("p", { class: "notice" }, sentence)));
  }

  // Full texts are searched chunk by chunk, those that are in sight of the other filters first come first.
  async search() {
    const ticket = ++this.searching;
    const { text } = this.state;
    if (!text) {
      this.found = null;
      this.status.textContent = "";
      this.refresh();
      return;
    }
    const found = new Set(this.all.filter((entry) => `${entry.task} ${entry.snippet}`.toLowerCase().includes(text)).map((entry) => entry.id));
    const chunks = new Map();
    for (const entry of this.all) {
      const key = `${entry.run}/${entry.file}/${chunkOf(entry).number}`;
      if (!chunks.has(key)) chunks.set(key, []);
      chunks.get(key).push(entry);
    }
    let done = 0;
    let painted = 0;
    for (const entries of chunks.values()) {
      try {
        const part = await this.app.store.part(entries[0], "texts");
        if (ticket !== this.searching) return;
        const hits = new Set(part.strings.flatMap((string, i) => (string.toLowerCase().includes(text) ? [i] : [])));
        if (hits.size) for (const entry of entries) if (refers(part.records[chunkOf(entry).within], hits)) found.add(entry.id);
      } catch {
        if (ticket !== this.searching) return; // what can't be read can't be found; opening it says why
      }
      done += 1;
      const now = performance.now();
      if (now - painted > 150 && done < chunks.size) {
        painted = now;
        this.status.textContent = `Searching: ${Math.round((100 * done) / chunks.size)} %`;
        this.found = found;
        this.refresh(true);
        await new Promise((resolve) => setTimeout(resolve));
        if (ticket !== this.searching) return;
      }
    }
    this.found = found;
    this.status.textContent = `${count(found.size)} contain \u201c${plain(text, 40)}\u201d`;
    this.refresh();
  }

  // ---- comparing ---------------------------------------------------------------------------------------------

  // Sides that can be compared: what was played after a step by a run, or a file.
  sides() {
    const sides = new Map();
    for (const entry of this.all) {
      if (entry.kind === "step") continue;
      const key = `${entry.run}/${entry.file}`;
      if (!sides.has(key)) sides.set(key, { key, run: entry.run, step: entry.step, kind: entry.kind, entries: new Map() });
      sides.get(key).entries.set(`${entry.task}\n${entry.member ?? 0}`, entry);
    }
    return [...sides.values()].sort((a, b) => a.run - b.run || a.step - b.step || (a.key < b.key ? -1 : 1));
  }

  choices() {
    if (this.state.mode !== "compare") return;
    const sides = this.sides();
    this.byKey = new Map(sides.map((side) => [side.key, side]));
    if (!this.byKey.has(this.pair.a)) this.pair.a = sides.length ? sides[0].key : null;
    if (!this.byKey.has(this.pair.b) || this.pair.b === this.pair.a) {
      const own = sides.filter((side) => side.run === sides[0].run);
      this.pair.b = (own.length > 1 ? own[own.length - 1] : sides[sides.length - 1] || { key: null }).key;
    }
    const told = sides.map((side) => side.key).join("\n");
    if (told === this.toldSides) return;
    this.toldSides = told;
    const name = (side) => {
      const run = this.app.runs.length > 1 ? `${plain(this.app.runs[side.run].label, 50)}: ` : "";
      return run + (side.kind === "file" ? plain(side.key.slice(side.key.indexOf("/") + 1), 60) : side.step === 0 ? "before training" : `after step ${count(side.step)}`);
    };
    const choices = sides.map((side) => [side.key, name(side)]);
    const pick = (label, side) => labelled(label, select(label, choices, this.pair[side], (key) => { this.pair[side] = key; this.refresh(); this.reopen(); }));
    const text = el("input", { type: "search", placeholder: "part of its id", "aria-label": "Task" });
    text.addEventListener("input", debounce(120, () => { this.state.task = text.value.trim().toLowerCase(); this.refresh(); }));
    replace(this.compare, pick("Left", "a"), pick("Right", "b"), labelled("Task", text),
      el("div", { class: "field" }, el("span", {}, "Right against left"), segmented("Right against left", [["all", "All"], ["better", "Better"], ["worse", "Worse"], ["equal", "Equal"]], this.state.change, (change) => { this.state.change = change; this.refresh(); })));
  }

  pairs() {
    const a = this.byKey && this.byKey.get(this.pair.a);
    const b = this.byKey && this.byKey.get(this.pair.b);
    if (!a || !b || a === b) {
      this.count.textContent = "Comparing needs held-out tasks of two steps (samples/eval_*.jsonl.gz), or two files.";
      return [];
    }
    const items = [];
    for (const [key, left] of a.entries) {
      const right = b.entries.get(key);
      if (!right) continue;
      const change = left.reward === null || right.reward === null ? null : right.reward - left.reward;
      items.push({ id: `pair ${key}`, left, right, change });
    }
    const { task, change } = this.state;
    const kinds = { better: (item) => item.change > 0, worse: (item) => item.change < 0, equal: (item) => item.change === 0 };
    const kept = items.filter((item) => (!task || item.left.task.toLowerCase().includes(task)) && (change === "all" || kinds[change](item)));
    kept.sort((p, q) => Math.abs(q.change ?? -1) - Math.abs(p.change ?? -1) || inOrder(p.left, q.left));
    const times = (kind) => items.filter(kinds[kind]).length;
    this.count.textContent = `${count(kept.length)} tasks that both played; the right is better on ${count(times("better"))}, worse on ${count(times("worse"))}, equal on ${count(times("equal"))}`;
    return kept;
  }

  pairRow({ left, right, change }) {
    const kind = change > 0 ? "above" : change < 0 ? "below" : "";
    return el("div", { class: "row" },
      el("span", { class: `worth ${kind}` }, change === null ? NONE : signed(change, 3)),
      el("span", { class: "row-task" }, plain(left.task, 120) || "no task"),
      el("span", { class: "row-place" }, `${num(left.reward, 3)} \u2192 ${num(right.reward, 3)}`),
      el("span", { class: "row-text", dir: "auto" }, plain(right.snippet, 120) || el("i", {}, "empty reply")));
  }

  // ---- what is chosen ----------------------------------------------------------------------------------------

  open(item) {
    if (this.state.mode === "compare") this.show([item.left, item.right]);
    else {
      // A pair of replies to learn a preference from is read side by side.
      const group = this.groups.get(this.groupKey(item)) || [];
      this.show(group.length === 2 && group.some((one) => one.id === item.id) && item.kind === "step" ? [...group] : [item], item);
    }
  }

  reopen() {
    if (this.list.item) this.open(this.list.item);
    else this.prompt();
  }

  async show(entries, main = entries[0]) {
    const ticket = (this.opening = (this.opening || 0) + 1);
    this.chosen = entries;
    let trajectories;
    try {
      trajectories = await Promise.all(entries.map((entry) => this.app.store.trajectory(entry)));
    } catch (error) {
      if (ticket === this.opening) replace(this.detail, el("p", { class: "notice bad" }, `This trajectory can't be opened: ${plain(error.message, 300)}`));
      return;
    }
    if (ticket !== this.opening) return;
    const columns = columnsOf(trajectories);
    const by = columns.includes(this.state.by) ? this.state.by : columns[0];
    const most = by === "none" ? 1 : scaleOf(by, trajectories);
    const worth = largest(entries, trajectories);
    const colour = select("Colour of tokens", COLOURS.filter(([name]) => columns.includes(name)), by, (chosen) => {
      this.state.by = chosen;
      this.show(entries, main).then(() => $("select", this.detail)?.focus());
    });
    const group = this.state.mode === "browse" ? this.groups.get(this.groupKey(main)) || [] : [];
    replace(this.detail,
      el("div", { class: "detail-tools" }, labelled("Colour of tokens", colour), legend(by, most), group.length > 1 ? this.members(group, entries, main) : null),
      el("div", { class: entries.length > 1 ? "beside" : "" }, entries.map((entry, i) => {
        const side = entries.length > 1 ? this.sideName(entry, i) : null;
        return trajectoryNode(this.app, entry, trajectories[i], { by, most, worth, side });
      })));
    this.detail.dataset.entry = main.id;
    if (this.state.mode === "browse") this.detail.scrollTop = 0;
    if (!this.quiet) announce(`${plain(main.task, 80)}, reward ${rewardText(main)}`);
    this.quiet = false;
  }

  sideName(entry, i) {
    if (this.state.mode === "compare") return `${i ? "Right" : "Left"}: ${where(entry) || plain(entry.file, 60)}`;
    return this.groups.get(this.groupKey(entry)).length === 2 ? (entry.member === 0 ? "Chosen, or first" : "Rejected, or second") : where(entry);
  }

  // The other attempts of the group: one is opened, or put beside the first.
  members(group, entries, main) {
    const buttons = group.map((entry) => {
      const open = entries.some((one) => one.id === entry.id);
      const node = el("button", { type: "button", class: "chip", "aria-pressed": String(open), title: "Open; with Shift, put beside" }, `${(entry.member ?? 0) + 1}: ${rewardText(entry)}`);
      node.addEventListener("click", (event) => this.show(event.shiftKey && entry.id !== main.id ? [main, entry] : [entry], event.shiftKey ? main : entry));
      return node;
    });
    const beside = el("button", { type: "button", class: "quiet", click: () => this.show(entries.length > 1 ? [main] : extremes(group), main) }, entries.length > 1 ? "One alone" : "Best beside worst");
    return el("div", { class: "field members" }, el("span", {}, `Attempts at this task: ${count(group.length)}`), el("span", { class: "chips" }, buttons.slice(0, 64), beside));
  }

  keys(event) {
    if (event.key === "Escape") {
      event.preventDefault();
      this.list.node.focus();
    } else if (event.target === this.detail && (event.key === "j" || event.key === "k")) {
      this.list.select(this.list.selected + (event.key === "j" ? 1 : -1), true);
    }
  }
}

function extremes(group) {
  const sorted = [...group].sort(COMPARE.best);
  return [sorted[0], sorted[sorted.length - 1]];
}

// Whether a record of a chunk has one of these texts in what was asked, said or answered.
function refers(record, hits) {
  if (hits.has(record.answer) || hits.has(record.error)) return true;
  if (record.messages.some(([, content]) => hits.has(content))) return true;
  return record.turns.some((turn) => hits.has(turn.prompt) || hits.has(turn.reply));
}
