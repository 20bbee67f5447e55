// Making elements. Text becomes text nodes, never markup; no attribute that a browser would run or fetch can be set.

export const $ = (selector, root = document) => root.querySelector(selector);

const FORBIDDEN = /^(on|style$|src|srcset$|href$|xlink|action$|formaction$|data$)/i;

function apply(node, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") node.addEventListener(name, value);
    else if (name === "anchor") node.setAttribute("href", `#${String(value).replace(/[^\w-]/g, "")}`);
    else if (FORBIDDEN.test(name)) throw new Error(`attribute ${name} is not set from script`);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
}

function append(node, children) {
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    node.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return node;
}

// A function as a value is a listener: el("button", { class: "quiet", click: () => ... }, "Text").
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  apply(node, attributes);
  return append(node, children);
}

export function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  apply(node, attributes);
  return append(node, children);
}

export function replace(node, ...children) {
  node.replaceChildren();
  return append(node, children);
}

// For screen readers; what is seen stands elsewhere.
export function announce(text) {
  $("#announcer").textContent = text;
}

export function debounce(wait, call) {
  let timer = 0;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => call(...values), wait);
  };
}

let ids = 0;
export const unique = (prefix) => `${prefix}-${++ids}`;

// A row of buttons of which one is pressed.
export function segmented(label, choices, chosen, choose) {
  const group = el("div", { class: "segmented", role: "group", "aria-label": label });
  for (const [value, text] of choices) {
    const button = el("button", { type: "button", "aria-pressed": String(value === chosen) }, text);
    button.addEventListener("click", () => {
      for (const other of group.children) other.setAttribute("aria-pressed", String(other === button));
      choose(value);
    });
    group.append(button);
  }
  return group;
}

export function chip(text, pressed, toggle) {
  const button = el("button", { type: "button", class: "chip", "aria-pressed": String(pressed) }, text);
  button.addEventListener("click", () => {
    const now = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(now));
    toggle(now);
  });
  return button;
}

export function select(label, choices, chosen, choose) {
  const node = el("select", { "aria-label": label });
  for (const [value, text] of choices) node.append(el("option", { value, selected: value === chosen }, text));
  node.addEventListener("change", () => choose(node.value));
  return node;
}

export function labelled(text, control) {
  return el("label", { class: "field" }, el("span", {}, text), control);
}
