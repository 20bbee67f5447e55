// Text that a model or a stranger wrote: characters that hide, reorder or end text are shown by their code.

import { el } from "./dom.js";

const NAMES = new Map([
  [0x0, "NULL"], [0x7, "BELL"], [0x8, "BACKSPACE"], [0xd, "CARRIAGE RETURN"], [0x1b, "ESCAPE"], [0x7f, "DELETE"],
  [0xad, "SOFT HYPHEN"], [0x61c, "ARABIC LETTER MARK"], [0x200b, "ZERO WIDTH SPACE"], [0x200e, "LEFT-TO-RIGHT MARK"],
  [0x200f, "RIGHT-TO-LEFT MARK"], [0x2028, "LINE SEPARATOR"], [0x2029, "PARAGRAPH SEPARATOR"],
  [0x202a, "LEFT-TO-RIGHT EMBEDDING"], [0x202b, "RIGHT-TO-LEFT EMBEDDING"], [0x202c, "POP DIRECTIONAL FORMATTING"],
  [0x202d, "LEFT-TO-RIGHT OVERRIDE"], [0x202e, "RIGHT-TO-LEFT OVERRIDE"], [0x2060, "WORD JOINER"],
  [0x2066, "LEFT-TO-RIGHT ISOLATE"], [0x2067, "RIGHT-TO-LEFT ISOLATE"], [0x2068, "FIRST STRONG ISOLATE"],
  [0x2069, "POP DIRECTIONAL ISOLATE"], [0xfeff, "ZERO WIDTH NO-BREAK SPACE"], [0xfffd, "REPLACEMENT CHARACTER"],
]);
// Controls but tab and line feed; format characters that reorder or hide; tags and supplementary variation selectors,
// which carry hidden text; halves of pairs. Joiners inside words and emoji are left alone.
const HIDDEN =
  "[\\u0000-\\u0008\\u000B-\\u001F\\u007F-\\u009F\\u00AD\\u061C\\u180E\\u200B\\u200E\\u200F\\u2028-\\u202E" +
  "\\u2060-\\u206F\\uFEFF\\uFFF9-\\uFFFB\\u{E0000}-\\u{E0FFF}\\u{F0000}-\\u{10FFFF}\\p{Cs}]";
const RUN = new RegExp(`${HIDDEN}+`, "gu");
// Ends, starts and roles as chat templates write them.
const SPECIAL = /<\|[^|<>\n]{1,40}\|>|<\/?(?:s|bos|eos|pad|start_of_turn|end_of_turn|think)>|\[\/?INST\]/g;
const MARKS = 2000;

const code = (point) => `U+${point.toString(16).toUpperCase().padStart(4, "0")}`;

// A run of hidden characters in a few words: U+0000, or U+0000 x1,024.
function told(run) {
  const points = Array.from(run, (character) => character.codePointAt(0));
  const parts = [];
  for (let i = 0; i < points.length && parts.length < 12; ) {
    let j = i;
    while (j < points.length && points[j] === points[i]) j++;
    parts.push(j - i > 1 ? `${code(points[i])} \u00d7${(j - i).toLocaleString("en")}` : code(points[i]));
    i = j;
  }
  return { text: parts.join(" "), name: NAMES.get(points[0]) || "hidden or control character" };
}

const unwind = (text) => text.replace(/\r\n/g, "\n");

// As one line of plain text, for labels, titles and options.
export function plain(text, most = 400) {
  const whole = unwind(String(text ?? ""));
  const cut = whole.length > most ? `${whole.slice(0, most)}\u2026` : whole;
  return cut.replace(RUN, (run) => `\u27e8${told(run).text}\u27e9`).replace(/\s+/g, " ");
}

// Into a node, with marks for what hides and a quiet style for special tokens.
export function fill(node, text) {
  const whole = unwind(String(text ?? ""));
  let marks = 0;
  let from = 0;
  const flush = (to) => {
    if (to > from) special(node, whole.slice(from, to));
  };
  for (const match of whole.matchAll(RUN)) {
    if (++marks > MARKS) break;
    flush(match.index);
    const { text: shown, name } = told(match[0]);
    node.append(el("span", { class: "hidden-character", title: name }, shown));
    from = match.index + match[0].length;
  }
  flush(marks > MARKS ? from : whole.length);
  if (marks > MARKS) {
    const rest = whole.slice(from);
    node.append(
      rest.replace(RUN, "\ufffd"),
      el("span", { class: "hidden-character" }, `further hidden characters of this text are shown as \ufffd`),
    );
  }
  return node;
}

function special(node, text) {
  let from = 0;
  for (const match of text.matchAll(SPECIAL)) {
    if (match.index > from) node.append(text.slice(from, match.index));
    node.append(el("span", { class: "special" }, match[0]));
    from = match.index + match[0].length;
  }
  if (from < text.length) node.append(text.slice(from));
}

// A long text begins with its first characters; the rest is a button away.
export function passage(text, limit = 6000, attributes = {}) {
  const node = el("div", { class: "passage", dir: "auto", ...attributes });
  const whole = String(text ?? "");
  if (whole.length <= limit * 1.2) return fill(node, whole);
  let shown = 0;
  const more = el("button", { type: "button", class: "more" });
  const extend = (count) => {
    let to = Math.min(whole.length, shown + count);
    if (to < whole.length && /[\uD800-\uDBFF]/.test(whole[to - 1])) to += 1;
    const part = el("span");
    fill(part, whole.slice(shown, to));
    more.before(part);
    shown = to;
    const left = whole.length - shown;
    if (!left) more.remove();
    const next = Math.min(left, 100000);
    more.textContent =
      `Show ${next === left ? "the rest" : "more"}: ${left.toLocaleString("en")} of ` +
      `${whole.length.toLocaleString("en")} characters are hidden`;
  };
  more.addEventListener("click", () => extend(100000));
  node.append(more);
  extend(limit);
  return node;
}
