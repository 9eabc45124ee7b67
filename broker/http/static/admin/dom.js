// Elements, and figures as people read them. Rule: text of others goes into a page by `said` or as a text
// node, never as markup; addresses in links begin with `#/` and are encoded.

export function h(tag, props = {}, ...children) {
  const [name, ...classes] = tag.split(".");
  const element = document.createElement(name || "div");
  if (classes.length) element.className = classes.join(" ");
  for (const [key, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "class") element.classList.add(...value.split(" ").filter(Boolean));
    else if (key in element && !key.startsWith("aria") && key !== "list" && key !== "form") element[key] = value;
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((each) => each !== null && each !== undefined && each !== false));
  return element;
}

const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]|[\ud800-\udfff](?![\udc00-\udfff])/gu;

// What cannot be seen, or turns the text around it, is written as an escape.
export function visible(text) {
  return String(text).replace(UNSEEN, (one) => `\\u${one.codePointAt(0).toString(16).padStart(4, "0")}`);
}

// Text that a stranger chose: it cannot change the direction of what stands beside it.
export function said(text, empty = "–") {
  return text === "" || text === null || text === undefined
    ? h("span.none", {}, empty)
    : h("bdi", {}, visible(text));
}

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

export function link(parts, ...children) {
  return h("a", { href: `#/${parts.map(encodeURIComponent).join("/")}` }, ...children);
}

const whole = new Intl.NumberFormat("en");
export const count = (value) => whole.format(Math.round(value));

export function brief(value) {
  if (value < 10 && value % 1) return value.toFixed(1);
  if (value < 10000) return whole.format(Math.round(value));
  const [unit, size] = value < 1e6 ? ["k", 1e3] : value < 1e9 ? ["M", 1e6] : ["G", 1e9];
  const shown = value / size;
  return `${shown < 100 ? shown.toFixed(1) : Math.round(shown)}${unit}`;
}

export function bytes(value) {
  if (!Number.isFinite(value)) return "no limit";
  let unit = 0;
  while (value >= 1023.5 && unit < 4) { value /= 1024; unit += 1; }
  const digits = unit === 0 || value >= 100 || value % 1 === 0 ? 0 : value >= 10 ? 1 : 2;
  return `${value.toFixed(digits)} ${["B", "KiB", "MiB", "GiB", "TiB"][unit]}`;
}

export function span(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds === 0) return "0 s";
  if (seconds < 0.001) return `${Math.round(seconds * 1e6)} µs`;
  if (seconds < 1) return `${(seconds * 1000).toFixed(seconds < 0.01 ? 1 : 0)} ms`;
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 60) return `${Math.round(seconds)} s`;
  const [large, one, small, other] = seconds < 3600 ? [60, "min", 1, "s"] : seconds < 86400 ? [3600, "h", 60, "min"] : [86400, "d", 3600, "h"];
  const rest = Math.floor((seconds % large) / small);
  return `${Math.floor(seconds / large)} ${one}${rest ? ` ${rest} ${other}` : ""}`;
}

const clock = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const day = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short" });
export function when(seconds) {
  const date = new Date(seconds * 1000);
  const shown = Date.now() - date < 86400e3 / 2 ? clock.format(date) : `${day.format(date)} ${clock.format(date)}`;
  return h("time", { dateTime: date.toISOString(), title: date.toISOString() }, shown);
}

// A table with a heading a column; `rows` are lists of cells. A column is [title, class, whether its title is
// for those alone who cannot see what is in it].
export function table(caption, columns, rows, empty) {
  if (!rows.length) return empty;
  return h("div.scroll", { tabindex: 0, role: "region", "aria-label": caption },
    h("table", {},
      h("caption.away", {}, caption),
      h("thead", {}, h("tr", {}, columns.map(([title, kind, unseen]) => h("th", { scope: "col", class: kind || "" }, unseen ? h("span.away", {}, title) : title)))),
      h("tbody", {}, rows.map((cells) => h("tr", {}, cells.map((cell, place) =>
        h("td", { class: columns[place][1] || "", "data-label": columns[place][2] ? "" : columns[place][0] }, cell)))))));
}

export function nothing(title, text, more) {
  return h("div.empty", {}, h("strong", {}, title), text && h("p", {}, text), more && h("p", {}, more));
}

export function card(title, body, aside) {
  const heading = title && h("h2", {}, title);
  return h("section.card", {}, title && h("div.head", {}, heading, aside), body);
}

// Name and value, side by side.
export function facts(pairs) {
  return h("dl.facts", {}, pairs.filter(Boolean).map(([name, value, note]) =>
    h("div", {}, h("dt", {}, name), h("dd", {}, value, note && h("small", {}, note)))));
}

export function meter(label, value, limit, text) {
  const part = Number.isFinite(limit) && limit > 0 ? Math.min(1, value / limit) : 0;
  const bar = h("div.bar", { class: part > 0.9 ? "full" : part > 0.7 ? "high" : "" }, h("i"));
  bar.firstChild.style.width = `${(part * 100).toFixed(2)}%`;
  return h("div.meter", {}, h("div", {}, h("span", {}, label), h("span.num", {}, text)), bar);
}

// Replace what a place shows only where it has changed, so that focus, selection and scrolling stay. Nothing in
// there may have a listener of its own: what is clicked says by `data-act` what is to be done.
export function fill(place, ...children) {
  morph(place, h("div", {}, ...children));
}

function morph(old, fresh) {
  const before = [...old.childNodes], after = [...fresh.childNodes];
  after.forEach((child, place) => {
    const there = before[place];
    if (!there) old.append(child);
    else if (there.isEqualNode(child)) return;
    else if (alike(there, child)) morph(there, child);
    else there.replaceWith(child);
  });
  before.slice(after.length).forEach((child) => child.remove());
}

function alike(one, other) {
  if (one.nodeType !== 1 || other.nodeType !== 1 || one.tagName !== other.tagName) return false;
  if (one.tagName === "DETAILS") return true; // open or not is the reader's own
  if (one.attributes.length !== other.attributes.length) return false;
  return [...one.attributes].every((each) => other.getAttribute(each.name) === each.value);
}
