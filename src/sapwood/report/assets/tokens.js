// A reply, token by token, tinted by a number: blue above and orange below what is neutral, or violet by how unlikely.

import { announce, el, unique } from "./dom.js";
import { NONE, num, signed } from "./format.js";
import { fill, passage, plain } from "./text.js";

// Tokens that are put on the page at once.
const STEP = 3000;

export const COLOURS = [
  ["advantages", "Advantage"],
  ["ratios", "Ratio after / before the update"],
  ["logprobs", "Log-probability, trainer"],
  ["sampled_logprobs", "Log-probability, sampler"],
  ["none", "No colour"],
];
const NEUTRAL = { advantages: 0, ratios: 0, logprobs: null, sampled_logprobs: null };
const place = (by, value) => (by === "ratios" ? (value > 0 ? Math.log(value) : null) : value);

// Which columns any of these turns has.
export function columnsOf(trajectories) {
  const turns = trajectories.flatMap((trajectory) => trajectory.turns);
  return COLOURS.map(([name]) => name).filter((name) => name === "none" || turns.some((turn) => turn.tokens[name] && turn.tokens[name].some((v) => v !== null)));
}

// What full colour stands for: the largest distance from neutral among these trajectories.
export function scaleOf(by, trajectories) {
  let most = 0;
  for (const trajectory of trajectories)
    for (const turn of trajectory.turns)
      for (const value of turn.tokens[by] || []) {
        const at = value === null ? null : place(by, value);
        if (at !== null) most = Math.max(most, Math.abs(at));
      }
  if (by === "ratios") return Math.max(most, 0.01);
  return most || 1;
}

function tint(node, by, value, most) {
  const at = value === null || value === undefined ? null : place(by, value);
  if (at === null) {
    node.classList.add("unknown");
    return;
  }
  const kind = NEUTRAL[by] === null ? "unlikely" : at >= 0 ? "above" : "below";
  node.classList.add(kind);
  node.style.setProperty("--a", (Math.min(1, Math.abs(at) / most) * 0.78).toFixed(3));
}

export function legend(by, most) {
  if (by === "none") return null;
  const title = COLOURS.find(([name]) => name === by)[1];
  const stops = NEUTRAL[by] === null ? [0, 0.25, 0.5, 0.75, 1] : [-1, -0.5, 0, 0.5, 1];
  const label = (at) => {
    if (by === "ratios") return num(Math.exp(at * most), 3);
    return NEUTRAL[by] === null ? num(-at * most, 3) : signed(at * most, 3);
  };
  return el("div", { class: "scale", role: "img", "aria-label": `${title}: ${label(stops[0])} to ${label(stops[stops.length - 1])}` },
    el("span", {}, title),
    el("span", { class: "steps" }, stops.map((at) => {
      const box = el("span", { class: `token ${NEUTRAL[by] === null ? "unlikely" : at >= 0 ? "above" : "below"}` }, label(at));
      box.style.setProperty("--a", (Math.abs(at) * 0.78).toFixed(3));
      return box;
    })));
}

function numbers(tokens, i) {
  const at = (name) => (tokens[name] ? tokens[name][i] : undefined);
  const told = [];
  const add = (label, value, show) => value !== undefined && told.push(`${label} ${value === null ? NONE : show(value)}`);
  add("advantage", at("advantages"), (v) => signed(v, 4));
  add("ratio", at("ratios"), (v) => num(v, 5));
  add("log-probability", at("logprobs"), (v) => `${num(v, 4)} (${(100 * Math.exp(v)).toPrecision(3)} %)`);
  add("as sampled", at("sampled_logprobs"), (v) => num(v, 4));
  add("id", at("ids"), (v) => String(v));
  return told.join(" \u00b7 ");
}

// The reply of a turn; tokens where they were recorded, the text otherwise.
export function reply(turn, by, most) {
  const { tokens } = turn;
  const pieces = tokens.tokens;
  if (!pieces || !pieces.length) {
    const known = COLOURS.some(([name]) => tokens[name]);
    return el("div", {}, passage(turn.reply || "", 20000, { class: "passage reply-text" }),
      known && by !== "none" ? el("p", { class: "nothing" }, "The texts of the tokens were not recorded, so they can't be coloured.") : null);
  }
  const prefix = unique("token");
  const line = el("p", { class: "token-line", "aria-hidden": "true" }, `${pieces.length.toLocaleString("en")} tokens. Point at one, or move with the arrow keys.`);
  const box = el("div", { class: "tokens", tabindex: 0, role: "group", "aria-label": `Reply, ${pieces.length} tokens; arrow keys read them` });
  let shown = 0;
  let cursor = -1;
  const more = el("button", { type: "button", class: "more" });
  const extend = () => {
    const to = Math.min(pieces.length, shown + STEP);
    const part = document.createDocumentFragment();
    for (let i = shown; i < to; i++) {
      const node = el("span", { class: /^\s*<\|[^|<>]*\|>$/.test(pieces[i]) ? "token control" : "token", id: `${prefix}-${i}` });
      if (pieces[i].includes("\n")) node.classList.add("newline");
      if (pieces[i] === "") node.classList.add("part"); // bytes that only the next tokens make a character of
      if (by !== "none") tint(node, by, tokens[by] ? tokens[by][i] : null, most);
      fill(node, pieces[i]);
      part.append(node);
    }
    box.insertBefore(part, more.parentNode === box ? more : null);
    shown = to;
    if (shown < pieces.length) {
      more.textContent = `Show ${Math.min(STEP, pieces.length - shown).toLocaleString("en")} more of ${pieces.length.toLocaleString("en")} tokens`;
      box.append(more);
    } else more.remove();
  };
  more.addEventListener("click", (event) => {
    event.stopPropagation();
    extend();
  });
  const read = (i, aloud) => {
    if (cursor >= 0) document.getElementById(`${prefix}-${cursor}`)?.classList.remove("at");
    cursor = i;
    const node = document.getElementById(`${prefix}-${i}`);
    if (!node) return;
    node.classList.add("at");
    if (aloud) node.scrollIntoView({ block: "nearest" });
    const text = plain(JSON.stringify(pieces[i]).slice(1, -1), 60);
    line.textContent = `Token ${i + 1} of ${pieces.length} \u201c${text}\u201d \u00b7 ${numbers(tokens, i)}`;
    if (aloud) announce(line.textContent);
  };
  box.addEventListener("pointerover", (event) => {
    const node = event.target.closest(".token");
    if (node && node.id) read(Number(node.id.slice(prefix.length + 1)), false);
  });
  box.addEventListener("keydown", (event) => {
    if (event.target !== box) return;
    const to = { ArrowRight: cursor + 1, ArrowLeft: cursor - 1, Home: 0, End: shown - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    read(Math.max(0, Math.min(shown - 1, to)), true);
  });
  extend();
  const cut = tokens.count > pieces.length ? el("p", { class: "nothing" }, `Only the first ${pieces.length.toLocaleString("en")} of ${tokens.count.toLocaleString("en")} tokens are in this page.`) : null;
  return el("div", {}, box, line, cut);
}
