// The shell: log in, find the page that the address names, keep it fresh, and do what is clicked.

import { h, icon, visible } from "./dom.js";
import { Fleet } from "./fleet.js";
import { Session } from "./session.js";
import * as views from "./views.js";

const FRESH = 2000;
const PAGES = [
  ["overview", "Overview", views.Overview], ["connections", "Connections", views.Connections, views.Connection],
  ["topics", "Topics", views.Topics, views.Topic], ["closed", "Ended", views.Closed], ["trace", "Trace", views.Trace],
  ["tree", "Nursery tree", views.Tree], ["budgets", "Budgets", views.Budgets], ["engine", "Engine", views.Engine], ["config", "Config", views.Config],
];

const $ = (id) => document.getElementById(id);
const session = new Session();
const fleet = new Fleet();
let view = null, fresh = 0, patience = 0, busy = false;

// log in

$("unsafe").hidden = location.protocol === "https:" || ["localhost", "127.0.0.1", "[::1]"].includes(location.hostname);
$("login").querySelector("form").addEventListener("submit", (event) => {
  event.preventDefault();
  $("refused").textContent = "";
  session.open($("key").value);
});

session.addEventListener("turned", async ({ detail }) => {
  $("line").dataset.state = detail.state;
  $("line-text").textContent = detail.state;
  clearTimeout(patience);
  if (detail.state === "connecting" && $("app").hidden) patience = setTimeout(wait, 1500);
  if (detail.state === "connected") await enter();
  else if (detail.state === "disconnected") leave(detail);
});

// The broker does not answer: it is asked again and again, and another key may be tried.
function wait() {
  $("login").hidden = false;
  $("refused").textContent = "The broker does not answer yet.";
}

async function enter() {
  $("key").value = "";
  try {
    fleet.begin(await session.call("overview"));
  } catch (error) { tell(error.message, true); return; }
  name();
  $("role").textContent = session.role === "full" ? "full access" : "view only";
  const first = $("app").hidden;
  $("login").hidden = true;
  $("app").hidden = false;
  if (first || !view) go(); else { view.id = null; view.begun = false; refresh(); }
}

// Whose page this is, and the nodes that can be chosen.
function name() {
  const here = fleet.nodes.get(fleet.here), which = $("which");
  const called = fleet.several ? `${fleet.nodes.size} nodes` : visible(here.name);
  $("node").textContent = called;
  $("version").textContent = fleet.several ? `page of ${visible(here.name)}` : here.facts.version;
  document.title = `${called} – trio-broker`;
  which.hidden = !fleet.several;
  which.replaceChildren(h("option", { value: "" }, "All nodes"),
    ...fleet.all.map(({ id, name }) => h("option", { value: id }, visible(name))));
  which.value = fleet.chosen;
}

$("which").addEventListener("change", () => choose($("which").value));

function choose(id) {
  fleet.chosen = id;
  $("which").value = id;
  go();
}

function leave({ reason, code }) {
  view?.end();
  view = null;
  clearTimeout(fresh);
  $("view").replaceChildren();
  $("app").hidden = true;
  $("login").hidden = false;
  $("refused").textContent = code ? `${visible(reason || "the connection has ended")}.` : "";
  document.title = "trio-broker";
  $("key").focus();
}

$("leave").addEventListener("click", () => session.close());

// pages

$("nav").append(...PAGES.map(([name, title]) => h("a", { href: `#/${name}`, "data-page-name": name }, icon(name), h("span", {}, title))));

function go() {
  const parts = location.hash.replace(/^#\/?/, "").split("/").map(decode);
  let [, title, List, One] = PAGES.find(([name]) => name === parts[0]) || PAGES[0];
  const args = parts.slice(1).filter((each) => each !== "");
  let Kind = List;
  if (One && args.length) {
    if (args[0] === "search") args.shift(); else Kind = One;
  }
  if (view instanceof views.Trace && Kind === views.Trace) return;
  view?.end();
  view = new Kind(session, fleet, args);
  $("view").replaceChildren(view.element);
  $("view").scrollTop = 0;
  for (const each of $("nav").children) {
    if (each.dataset.pageName === (parts[0] || "overview")) each.setAttribute("aria-current", "page");
    else each.removeAttribute("aria-current");
  }
  $("nav").querySelector("[aria-current]")?.scrollIntoView({ block: "nearest", inline: "center" });
  view.tick();
  refresh();
}

function decode(text) { try { return decodeURIComponent(text); } catch { return text; } }

window.addEventListener("hashchange", () => {
  if (session.state !== "connected") return;
  go();
  $("view").focus({ preventScroll: true });
});

async function refresh() {
  clearTimeout(fresh);
  const asked = view;
  if (asked && session.state === "connected" && !busy && !document.hidden) {
    busy = true;
    try {
      if (await fleet.refresh(session)) name();
      asked.mark();
      await asked.refresh();
      asked.element.querySelector(":scope > .failed")?.remove();
    } catch (error) {
      if (asked === view && session.state === "connected") {
        asked.element.querySelector(":scope > .failed")?.remove();
        asked.element.append(h("p.failed.card", { role: "alert" }, visible(error.message || "failed")));
      }
    } finally { busy = false; }
    if (asked !== view) { refresh(); return; }
  }
  fresh = setTimeout(refresh, FRESH);
}
document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); });

session.addEventListener("told", ({ detail }) => {
  if (detail.tick) { fleet.add(fleet.here, detail.tick); if (!document.hidden) view?.tick(); }
  else view?.told(detail);
});

// acts

const ACTS = {
  async choose({ node }) { choose(node); },
  async kick({ fd }) {
    const said = await ask(`Disconnect fd ${fd}`, "It gets what is queued for it, then this code and reason.", [
      { name: "code", label: "Code", value: "3503", options: [["3503", "3503, and stay away"], ["3011", "3011, and come back at once"]] },
      { name: "reason", label: "Reason", value: "force disconnect", max: 120 }], "Disconnect", true);
    if (said) await done(`fd ${fd} is being disconnected`, "kick", { fd: Number(fd), code: Number(said.code), reason: said.reason });
  },
  async unsubscribe({ fd, topic }) {
    const said = await ask(`Unsubscribe fd ${fd}`, `From ${visible(topic)}. The client is told, and stays unsubscribed.`, [], "Unsubscribe", true);
    if (said) await done(`fd ${fd} is unsubscribed`, "unsubscribe", { fd: Number(fd), topic });
  },
  async push({ fd }) {
    const said = await ask(`Push to fd ${fd}`, "One message, to this connection alone.", [{ name: "data", label: "JSON", value: "{}", lines: 5, json: true }], "Push");
    if (said) await done(`pushed to fd ${fd}`, "push", { fd: Number(fd), data: said.data });
  },
  async publish({ topic = "" }) {
    const said = await ask("Publish", "As your program does: no rule for clients is asked.", [
      { name: "topic", label: "Topic", value: topic, max: 255 }, { name: "data", label: "JSON", value: "{}", lines: 5, json: true },
      { name: "retain", label: "Retain as the topic's last value", check: true }], "Publish");
    if (!said) return;
    const report = await done(null, "publish", said);
    if (report) tell(`published: ${report.queued} of ${report.matched} subscriptions took it`);
  },
};

document.addEventListener("click", (event) => {
  const { act, ...args } = event.target.closest?.("[data-act]")?.dataset || {};
  if (act) ACTS[act](args);
});

async function done(text, method, data) {
  try {
    const result = await session.call(method, data);
    if (text) tell(text);
    refresh();
    return result;
  } catch (error) { tell(error.message, true); return null; }
}

function tell(text, bad = false) {
  const note = h("p", { class: bad ? "toast bad" : "toast" }, visible(text));
  $("said").append(note);
  setTimeout(() => note.remove(), bad ? 8000 : 4000);
}

// Ask in a dialog: the values, or null for who thought better of it.
function ask(title, text, fields, verb, danger = false) {
  const dialog = $("ask"), wrong = h("p.bad", { role: "alert" });
  const inputs = fields.map((each) => {
    const id = `ask-${each.name}`;
    const input = each.options ? h("select", { id }, each.options.map(([value, shown]) => h("option", { value }, shown)))
      : each.lines ? h("textarea", { id, rows: each.lines, spellcheck: false, value: each.value })
      : each.check ? h("input", { id, type: "checkbox" })
      : h("input", { id, value: each.value, maxLength: each.max, required: each.name === "topic", spellcheck: false, autocomplete: "off" });
    return { each, input, row: h("div", { class: each.check ? "field check" : "field" }, h("label", { htmlFor: id }, each.label), input) };
  });
  return new Promise((resolve) => {
    let result = null;
    const form = h("form", {
      onsubmit: (event) => {
        event.preventDefault();
        const values = {};
        for (const { each, input } of inputs) {
          if (each.json) {
            try { values[each.name] = JSON.parse(input.value); } catch (error) { wrong.textContent = `That is no JSON: ${error.message}`; input.focus(); return; }
          } else values[each.name] = each.check ? input.checked : input.value;
        }
        result = values;
        dialog.close();
      },
    }, h("h2", { id: "ask-title" }, title), h("p.soft", {}, text), inputs.map(({ row }) => row), wrong,
    h("div.pages", {}, h("button", { type: "button", onclick: () => dialog.close() }, "Cancel"), h("button", { class: danger ? "danger" : "primary" }, verb)));
    dialog.setAttribute("aria-labelledby", "ask-title");
    dialog.replaceChildren(form);
    dialog.addEventListener("close", () => { dialog.replaceChildren(); resolve(result); }, { once: true });
    dialog.showModal();
  });
}

// light and dark

const THEMES = ["", "light", "dark"];
function paint(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme-text").textContent = `Theme: ${theme || "as the system"}`;
  view?.repaint();
}
$("theme").addEventListener("click", () => {
  const next = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme || "") + 1) % 3];
  localStorage.setItem("trio-broker.theme", next);
  paint(next);
});
paint(THEMES.includes(localStorage.getItem("trio-broker.theme")) ? localStorage.getItem("trio-broker.theme") : "");
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => view?.repaint());

if (session.kept) session.open(session.kept);
else { $("login").hidden = false; $("key").focus(); }
