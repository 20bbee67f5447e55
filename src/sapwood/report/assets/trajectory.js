// One trajectory: what was asked, what was said, what it earned and how every token was judged.

import { el } from "./dom.js";
import { NONE, count, num, signed } from "./format.js";
import { reply } from "./tokens.js";
import { passage, plain } from "./text.js";

export const FLAGS = [
  [1, "parse failure", "Parse failures", "bad"],
  [2, "fallback", "Fallbacks", "warn"],
  [4, "error", "Errors", "bad"],
  [8, "truncated", "Truncated", "warn"],
  [16, "reply cut", "Cut replies", "warn"],
];

export const badges = (flags) => FLAGS.filter(([bit]) => flags & bit).map(([, name, , kind]) => el("span", { class: `badge ${kind}` }, name));

export function where(entry) {
  if (entry.kind === "eval") return entry.step === 0 ? "held out, before training" : `held out, after step ${count(entry.step)}`;
  if (entry.kind === "step") return `learnt from at step ${count(entry.step)}`;
  return entry.step ? `step ${count(entry.step)}` : "";
}

const STOPS = { eos: "ended by itself", stop: "ended at a stop text", length: "cut at the token limit", context: "cut where the context is full" };

// The largest reward, or part of one, among trajectories that stand side by side.
export function largest(entries, trajectories) {
  const parts = trajectories.flatMap((trajectory) => trajectory.parts.map(([, value]) => value));
  return [...entries.map((entry) => entry.reward), ...parts].reduce((most, value) => Math.max(most, Math.abs(value ?? 0)), 1e-9);
}

// Parts of the reward, a bar from zero each.
function rewards(entry, trajectory, most) {
  const { parts } = trajectory;
  const row = (name, value, kind) => {
    const bar = el("span", { class: `length ${value < 0 ? "below" : "above"}` });
    bar.style.setProperty("width", `${(50 * Math.abs(value ?? 0)) / most}%`);
    return el("tr", { class: kind }, el("th", { scope: "row" }, name), el("td", { class: "number" }, signed(value, 4)), el("td", { class: "bars", "aria-hidden": "true" }, bar));
  };
  return el("table", { class: "rewards" }, el("caption", { class: "unseen" }, "Rewards"), el("tbody", {}, row("Reward", entry.reward, "total"), parts.map(([name, value]) => row(plain(name, 80), value, ""))));
}

function info(turn) {
  if (!turn.info.length) return null;
  return el("details", { class: "info" }, el("summary", {}, `What the world said (${turn.info.length})`),
    el("dl", {}, turn.info.map(([name, value]) => [el("dt", {}, plain(name, 80)), el("dd", {}, passage(value, 400))])));
}

function said(role, text, limit) {
  return el("div", { class: "said" }, el("h5", {}, plain(role, 40)), passage(text, limit));
}

function turnNode(turn, number, total, by, most, folded) {
  const facts = [STOPS[turn.stop] || plain(turn.stop, 60), turn.tokens.count ? `${count(turn.tokens.count)} tokens` : "", turn.reward === null || total === 1 ? "" : `paid ${signed(turn.reward, 4)}`].filter(Boolean);
  return el("section", { class: "turn", "aria-label": `Turn ${number} of ${total}` },
    total > 1 ? el("h4", {}, `Turn ${count(number)}`, turn.restart && number > 1 ? el("span", { class: "badge" }, "conversation restarted") : null) : null,
    turn.prompt === null ? null
      : folded ? el("details", { class: "said" }, el("summary", {}, "Prompt as the model saw it"), passage(turn.prompt, 20000))
        : said("Prompt", turn.prompt, number === 1 ? 6000 : 3000),
    el("div", { class: "said reply" }, el("h5", {}, "Reply", el("small", {}, ` ${facts.join(" \u00b7 ")}`)), reply(turn, by, most)),
    info(turn));
}

// entry: its row of the index; trajectory: its texts and tokens; by, most: the colour and what full colour means;
// worth: the reward that a full bar stands for; side: what is said above where two stand side by side.
export function trajectoryNode(app, entry, trajectory, { by, most, worth, side }) {
  const several = app.runs.length > 1;
  const turns = trajectory.turns;
  const asked = trajectory.messages.length > 0;
  return el("article", { class: `trajectory run-${app.runs[entry.run].colour}`, "aria-label": `Trajectory of ${plain(entry.task, 80)}` },
    el("header", {}, side ? el("p", { class: "side-name" }, side) : null,
      el("h3", { dir: "auto" }, plain(entry.task, 300) || "no task"),
      el("p", {}, several ? [el("span", { class: "swatch" }), plain(app.runs[entry.run].label, 60)] : null,
        [side ? "" : where(entry), entry.member === null ? "" : `attempt ${entry.member + 1}`, turns.length > 1 ? `${count(turns.length)} turns` : "", trajectory.ended]
          .filter(Boolean).map((word, i) => (i || several ? ` \u00b7 ${word}` : word)), " ", badges(entry.flags))),
    entry.reward === null && !trajectory.parts.length ? null : rewards(entry, trajectory, worth),
    trajectory.error === null ? null : el("div", { class: "said wrong" }, el("h5", {}, "Error"), passage(trajectory.error, 3000)),
    asked ? el("div", { class: "messages" }, trajectory.messages.map((message) => said(message.role, message.content, 6000))) : null,
    trajectory.answer === null ? null : said("Expected answer", trajectory.answer, 3000),
    turns.length ? turns.map((turn, i) => turnNode(turn, i + 1, turns.length, by, most, asked && i === 0)) : el("p", { class: "nothing" }, "It has no turns."));
}

export const rewardText = (entry) => (entry.reward === null ? NONE : num(entry.reward, 3));
