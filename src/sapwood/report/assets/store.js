// Where the page's data comes from: blocks in this file, or the server that shows a run while it goes on.

import { $ } from "./dom.js";

// Decoded chunks that are kept; the oldest goes first.
const KEPT = 64;

async function inflate(bytes) {
  if (typeof DecompressionStream === "undefined") {
    throw new Error("This browser can't unpack the samples (no DecompressionStream); a current one can.");
  }
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

function fromBase64(text) {
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes;
}

class Cache {
  constructor(most) {
    this.most = most;
    this.held = new Map();
  }

  // The value under a key, made where it isn't there; a failure is not kept.
  get(key, make) {
    let found = this.held.get(key);
    if (found === undefined) {
      found = make();
      found.catch(() => this.held.delete(key));
    }
    this.held.delete(key);
    this.held.set(key, found);
    if (this.held.size > this.most) this.held.delete(this.held.keys().next().value);
    return found;
  }
}

// Trajectories of a file: one object a trajectory, which the list, the filters and the details share.
function entriesOf(run, index, place, mark) {
  return index.rows.map((row, pos) => ({
    id: `${run}/${index.file}/${pos}`,
    run,
    file: index.file,
    kind: index.kind,
    place,
    mark,
    pos,
    task: index.tasks[row[0]],
    group: row[1],
    member: row[2],
    reward: row[3],
    turns: row[4],
    tokens: row[5],
    flags: row[6],
    step: row[7],
    snippet: row[8],
    starts: index.starts,
  }));
}

// The chunk of a trajectory, and its number within it.
export function chunkOf(entry) {
  let low = 0;
  let high = entry.starts.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (entry.starts[middle] <= entry.pos) low = middle;
    else high = middle - 1;
  }
  return { number: low, within: entry.pos - entry.starts[low] };
}

class Store {
  constructor(report) {
    this.report = report;
    this.cache = new Cache(KEPT);
  }

  // part: "texts" or "tokens".
  part(entry, part) {
    const { number } = chunkOf(entry);
    const key = `${entry.run}/${entry.file}/${entry.mark}/${number}/${part}`;
    return this.cache.get(key, async () => inflate(await this.bytes(entry, number, part)));
  }

  async trajectory(entry) {
    const [texts, tokens] = await Promise.all([this.part(entry, "texts"), this.part(entry, "tokens")]);
    const { within } = chunkOf(entry);
    const record = texts.records[within];
    const text = (number) => (number === null || number === undefined ? null : texts.strings[number]);
    return {
      ...record,
      answer: text(record.answer),
      error: text(record.error),
      messages: record.messages.map(([role, content]) => ({ role, content: text(content) })),
      turns: record.turns.map((turn, i) => ({
        ...turn,
        prompt: text(turn.prompt),
        reply: text(turn.reply),
        info: turn.info.map(([name, value]) => [name, text(value)]),
        tokens: tokens[within][i],
      })),
    };
  }
}

// A report in a file.
export class Embedded extends Store {
  async entries(done) {
    const found = await inflate(this.block("index"));
    const places = new Map();
    const all = [];
    for (const [run, index] of found) {
      const place = places.get(run) ?? 0;
      places.set(run, place + 1);
      all.push(...entriesOf(run, index, place, ""));
    }
    done(all);
  }

  async bytes(entry, number, part) {
    return this.block(`c${entry.run}-${entry.place}-${number}-${part}`);
  }

  block(id) {
    const node = document.getElementById(id);
    if (node === null) throw new Error("This part of the page is missing: the file was cut short.");
    return fromBase64(node.textContent);
  }
}

const WAIT = 2000;

// The server's runs. `watch` calls back with the runs that changed and, as they come, with trajectories.
export class Remote extends Store {
  constructor(report) {
    super(report);
    this.marks = report.runs.map(() => "");
    this.files = new Map();
  }

  async ask(path, query, kind) {
    const answer = await fetch(`${path}?${new URLSearchParams(query)}`, { cache: "no-store" });
    if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
    return kind === "bytes" ? new Uint8Array(await answer.arrayBuffer()) : answer.json();
  }

  async bytes(entry, number, part) {
    return this.ask("/chunk", { run: entry.run, file: entry.file, chunk: number, part }, "bytes");
  }

  // on.runs(numbers that changed), on.samples(run, files that are gone or replaced, entries), on.problems(run, sentences),
  // on.link(whether the server answers)
  async watch(on) {
    for (;;) {
      try {
        const report = await this.ask("/state", { known: this.marks.filter(Boolean).join(",") });
        const changed = [];
        report.runs.forEach((run, number) => {
          if (run === null) return;
          this.report.runs[number] = run;
          this.marks[number] = run.mark;
          changed.push(number);
        });
        this.report.made = report.made;
        on.link(true);
        if (changed.length) on.runs(changed);
        for (const number of changed) await this.follow(number, on);
      } catch (error) {
        on.link(false, error);
      }
      await new Promise((resolve) => setTimeout(resolve, document.hidden ? 5 * WAIT : WAIT));
    }
  }

  async follow(run, on) {
    const listed = this.report.runs[run].samples.files;
    const present = new Set(listed.map(([name]) => `${run}/${name}`));
    const own = `${run}/`;
    const gone = [...this.files.keys()].filter((key) => key.startsWith(own) && !present.has(key));
    for (const key of gone) this.files.delete(key);
    if (gone.length) on.samples(run, gone.map((key) => key.slice(own.length)), []);
    const missing = listed.filter(([name, , , mark]) => this.files.get(`${run}/${name}`) !== mark);
    for (let from = 0; from < missing.length; from += 40) {
      const batch = missing.slice(from, from + 40);
      const marks = new Map(batch.map(([name, , , mark]) => [name, mark]));
      const found = await this.ask("/index", { run, files: [...marks.keys()].join(",") });
      const arrived = [];
      for (const index of found) {
        this.files.set(own + index.file, marks.get(index.file));
        arrived.push(...entriesOf(run, index, 0, marks.get(index.file)));
        on.problems(run, index.problems);
      }
      on.samples(run, found.map((index) => index.file), arrived);
    }
  }
}

export function openStore() {
  const report = JSON.parse($("#report").textContent);
  if (!report.live) return new Embedded(report);
  report.runs = Array.from({ length: report.count }, () => null);
  return new Remote(report);
}
