// A list of any length of which only the rows in sight exist. Arrow keys, Page Up and Down, Home and End move in it.

import { el, unique } from "./dom.js";

const MARGIN = 6;

export class VirtualList {
  // options: label, height (of a row, px), row(item, selected) -> node, key(item), open(item), leave()
  constructor(options) {
    this.options = options;
    this.items = [];
    this.selected = -1;
    this.prefix = unique("row");
    this.space = el("div", { class: "space" });
    this.node = el("div", { class: "list", role: "listbox", tabindex: 0, "aria-label": options.label }, this.space);
    this.node.addEventListener("scroll", () => this.render());
    this.node.addEventListener("keydown", (event) => this.key(event));
    this.node.addEventListener("click", (event) => {
      const row = event.target.closest("[data-index]");
      if (row) this.select(Number(row.dataset.index), true);
    });
    if (typeof ResizeObserver !== "undefined") new ResizeObserver(() => this.render()).observe(this.node);
  }

  // What is selected stays selected, and the first row in sight stays where it is.
  set(items, keepPlace = true) {
    const { key, height } = this.options;
    const chosen = this.selected >= 0 && this.items[this.selected] ? key(this.items[this.selected]) : this.wanted;
    const first = Math.floor(this.node.scrollTop / height);
    const anchor = keepPlace && first > 0 && this.items[first] ? key(this.items[first]) : null;
    const offset = this.node.scrollTop - first * height;
    this.items = items;
    this.selected = chosen === undefined ? -1 : items.findIndex((item) => key(item) === chosen);
    this.wanted = chosen;
    this.space.style.setProperty("height", `${items.length * height}px`);
    if (anchor !== null) {
      const at = items.findIndex((item) => key(item) === anchor);
      if (at >= 0) this.node.scrollTop = at * height + offset;
    } else if (!keepPlace) this.node.scrollTop = 0;
    this.render();
  }

  get item() {
    return this.items[this.selected];
  }

  select(index, open) {
    if (!this.items.length) return;
    this.selected = Math.max(0, Math.min(this.items.length - 1, index));
    this.wanted = this.options.key(this.items[this.selected]);
    const { height } = this.options;
    const top = this.selected * height;
    if (top < this.node.scrollTop) this.node.scrollTop = top;
    else if (top + height > this.node.scrollTop + this.node.clientHeight) this.node.scrollTop = top + height - this.node.clientHeight;
    this.render();
    if (open) this.options.open(this.items[this.selected]);
  }

  render() {
    const { height, row } = this.options;
    const from = Math.max(0, Math.floor(this.node.scrollTop / height) - MARGIN);
    const to = Math.min(this.items.length, Math.ceil((this.node.scrollTop + this.node.clientHeight) / height) + MARGIN);
    const nodes = [];
    for (let i = from; i < to; i++) nodes.push(this.row(i, row(this.items[i])));
    // The selected row stays in the document, so that assistive technology can name it.
    if (this.selected >= 0 && (this.selected < from || this.selected >= to)) nodes.push(this.row(this.selected, row(this.items[this.selected])));
    this.space.replaceChildren(...nodes);
    if (this.selected >= 0) this.node.setAttribute("aria-activedescendant", `${this.prefix}-${this.selected}`);
    else this.node.removeAttribute("aria-activedescendant");
  }

  row(index, node) {
    node.id = `${this.prefix}-${index}`;
    node.dataset.index = String(index);
    node.dataset.key = this.options.key(this.items[index]);
    node.setAttribute("role", "option");
    node.setAttribute("aria-selected", String(index === this.selected));
    node.setAttribute("aria-setsize", String(this.items.length));
    node.setAttribute("aria-posinset", String(index + 1));
    node.style.setProperty("top", `${index * this.options.height}px`);
    node.style.setProperty("height", `${this.options.height}px`);
    return node;
  }

  key(event) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const page = Math.max(1, Math.floor(this.node.clientHeight / this.options.height) - 1);
    const to = {
      ArrowDown: this.selected + 1,
      ArrowUp: Math.max(0, this.selected - 1),
      PageDown: this.selected + page,
      PageUp: Math.max(0, this.selected - page),
      Home: 0,
      End: this.items.length - 1,
    }[event.key];
    if (to !== undefined) {
      event.preventDefault();
      this.select(to, true);
    } else if (event.key === "Enter" && this.item) {
      event.preventDefault();
      this.options.open(this.item);
      this.options.leave();
    }
  }
}
