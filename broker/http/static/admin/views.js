// The pages. Each builds what stays, and fills in what changes by `refresh`, which is called every two seconds.

import { brief, bytes, card, count, facts, fill, h, link, meter, nothing, said, span, table, visible, when } from "./dom.js";
import { Chart } from "./charts.js";

const MAY_ACT = "full";

class View {
  constructor(session, fleet, args) {
    Object.assign(this, { session, fleet, args });
    this.element = h("div.page");
    this.build();
  }

  get acts() { return this.session.role === MAY_ACT; }
  get samples() { return this.fleet.samples; }
  get which() { return { node: this.fleet.chosen }; }
  build() {}
  async refresh() {}
  tick() {}
  told() {}
  repaint() {}
  end() {}

  heading(title, ...aside) { return h("div.title", {}, h("h1", {}, title), h("div.aside", {}, aside)); }

  // The place where a page that is of one node alone says of which; `mark` is called before each refresh.
  whose = h("div.aside");
  mark() {
    const { several, chosen, one } = this.fleet;
    fill(this.whose, several && badge(visible(one.name), "accent"), several && !chosen && h("span.soft", {}, "one node at a time: choose it in the menu"));
  }

  // A table of rows, each of which is on a node: which, where there are several.
  nodeTable(caption, columns, rows, cells, empty) {
    const { several } = this.fleet;
    return table(caption, several ? [...columns, ["Node"]] : columns,
      rows.map((row) => several ? [...cells(row), said(row.node)] : cells(row)), empty);
  }
}

// Who has not answered: what is there is not in a list.
const missing = (page) => page.missing.length > 0 && h("p.card.alarm", { role: "alert" },
  h("strong", {}, "Not all is here: "), page.missing.map(({ name, reason }) => [said(name), `: ${visible(reason)}. `]));
const on = (counts) => Object.entries(counts).map(([name, number]) => [said(name), h("span.soft", {}, ` ${count(number)}`), " "]);

function badge(text, kind = "") { return h("span.badge", { class: kind }, text); }

const WHO = { client: "", server: "calm", heartbeat: "high", slow: "bad", shutdown: "calm", network: "high" };
const closer = (close) => badge(close.initiator, WHO[close.initiator] ?? "");
const client = (row) => row.operator ? badge("dashboard", "accent")
  : row.app_name ? h("span", {}, said(row.app_name), " ", h("span.soft", {}, said(row.app_version, "")))
  : h("span.soft", {}, row.protocol);
const topics = (row) => row.topic_count
  ? h("span", {}, row.topics.slice(0, 2).map((name) => [h("code", {}, said(name)), " "]), row.topic_count > 2 && h("span.soft", {}, `+${count(row.topic_count - 2)}`))
  : h("span.none", {}, "none");
const queue = (row) => row.bytes_queued ? h("span", { class: row.blocked ? "warn" : "" }, bytes(row.bytes_queued)) : h("span.none", {}, "0");
const idle = (row) => row.idle_seconds < 1 ? h("span.none", {}, "now") : span(Math.floor(row.idle_seconds));
const both = (one, other) => `${brief(one)} / ${brief(other)}`;

// What is searched for, and in which order; typing waits a moment before it asks.
function searchBar(label, hint, changed, ...more) {
  let waits = 0;
  const input = h("input", {
    type: "search", id: "search", placeholder: hint, value: "", maxLength: 256, spellcheck: false, autocomplete: "off",
    oninput: () => { clearTimeout(waits); waits = setTimeout(changed, 200); },
  });
  return { input, element: h("div.bar-of-tools", { role: "search" }, h("label.away", { htmlFor: "search" }, label), input, more) };
}

export class Overview extends View {
  build() {
    this.tiles = h("div.tiles");
    const rate = (name) => (samples) => samples.rates(name);
    const value = (name) => (samples) => samples.column(name);
    this.charts = [
      new Chart("Messages a second", "count", [
        { label: "delivered", values: rate("delivered") }, { label: "published", values: rate("published") }]),
      new Chart("Connections", "count", [{ label: "open", values: value("connections") }]),
      new Chart("Bytes a second", "bytes", [
        { label: "out", values: rate("bytes_out") }, { label: "in", values: rate("bytes_in") }]),
      new Chart("Event loop", "span", [{ label: "late by", values: value("lag") }]),
    ];
    this.heavy = h("div");
    this.closed = h("div");
    this.nodes = h("div");
    this.element.append(this.heading("Overview"), this.tiles, h("div.charts", {}, this.charts.map((each) => each.element)),
      this.nodes,
      h("div.two", {},
        card("Longest queues", this.heavy, link(["connections"], "All connections")),
        card("Ended last", this.closed, link(["closed"], "All of them"))));
  }

  tick() {
    const { samples, fleet } = this, now = samples.last;
    if (!now) return;
    const places = fleet.limit("places"), limit = fleet.limit("memory_limit");
    const tile = (name, value, note, kind = "") => h("div.tile", { class: kind }, h("span", {}, name), h("b.num", {}, value), h("small", {}, note));
    const late = now.lag > 0.25 ? "bad" : now.lag > 0.05 ? "warn" : "";
    fill(this.tiles,
      tile("Connections", count(now.connections), `of ${count(places)} places`, now.connections > places * 0.9 ? "warn" : ""),
      tile("Users", count(now.users), `${brief(now.subscriptions)} subscriptions`),
      tile("Published", brief(samples.rate("published")), "a second"),
      tile("Delivered", brief(samples.rate("delivered")), "a second"),
      tile("Out", bytes(samples.rate("bytes_out")), `a second; ${bytes(now.queued)} wait`),
      tile("Memory held", bytes(now.held), `of ${bytes(limit)}`, now.held > limit * 0.9 ? "bad" : ""),
      tile("Loop late by", span(now.lag), `CPU ${Math.round(samples.rate("cpu") * 100)} %, RSS ${bytes(now.resident)}`, late),
      tile("Cut as too slow", count(now.slow), `${count(now.refused)} refused, ${count(now.errors)} errors`));
    this.charts.forEach((each) => each.draw(samples));
    this.showNodes();
  }

  showNodes() {
    const { fleet } = this;
    if (!fleet.several || fleet.chosen) { fill(this.nodes); return; }
    fill(this.nodes, card("Nodes", table("Nodes", [["Node"], ["Connections", "num"], ["Published a second", "num"], ["Delivered a second", "num"], ["Wait", "num"], ["Memory held", "num"], ["Loop late by", "num"], ["Show", "num", true]],
      fleet.all.map(({ id, name, samples, reason }) => {
        const now = samples.last;
        const called = h("span", {}, h("b", {}, said(name)), id === fleet.here && [" ", badge("this page", "accent")],
          reason ? [" ", badge("does not answer", "bad")] : !now && [" ", badge("keeps no samples", "high")]);
        const figures = now && !reason ? [count(now.connections), brief(samples.rate("published")), brief(samples.rate("delivered")), bytes(now.queued), bytes(now.held), span(now.lag)] : Array(6).fill("–");
        return [called, ...figures, h("button.small", { type: "button", "data-act": "choose", "data-node": id, "aria-label": `Show ${visible(name)} alone` }, "Show")];
      })), h("span.soft", {}, "the figures above are sums; the loop is the latest of all")));
  }

  async refresh() {
    const [heavy, closed] = await Promise.all([
      this.session.call("connections", { order: "queue", limit: 6, ...this.which }), this.session.call("closed", { limit: 6, ...this.which })]);
    fill(this.heavy, missing(heavy), this.nodeTable("Connections with the longest queues", [["fd"], ["User"], ["Client"], ["Queue", "num"], ["Dropped", "num"]],
      heavy.rows, (row) => [link(["connections", row.fd], row.fd), said(row.user), client(row), queue(row), count(row.messages_dropped)],
      nothing("Nobody is here", "Open the page at / in another tab, and it appears here.")));
    fill(this.closed, missing(closed), this.nodeTable("Connections that ended last", [["fd"], ["User"], ["By"], ["Code", "num"], ["Reason"], ["When", "num"]],
      closed.rows, (row) => [link(["connections", row.fd], row.fd), said(row.user), closer(row.close), row.close.code, said(row.close.reason), when(row.closed_at)],
      nothing("Nothing has ended yet")));
  }

  repaint() { this.charts.forEach((each) => { each.repaint(); each.draw(this.samples); }); }
  end() { this.charts.forEach((each) => each.end()); }
}

export class Connections extends View {
  after = 0;
  before = [];

  build() {
    this.order = h("select", { id: "order", onchange: () => this.restart() },
      [["fd", "by fd"], ["queue", "longest queue"], ["received", "received most"], ["sent", "sent most"], ["topics", "most topics"]]
        .map(([value, text]) => h("option", { value }, text)));
    const bar = searchBar("Search connections", "fd, user:ann, address:10.1., topic:news, client:js",
      () => this.restart(), h("label.away", { htmlFor: "order" }, "Order"), this.order);
    this.search = bar.input;
    this.search.value = this.args[0] || "";
    this.total = h("span.soft");
    this.list = h("div");
    this.pages = h("div.pages");
    this.element.append(this.heading("Connections", this.total), bar.element, h("section.card.flush", {}, this.list), this.pages);
    this.pages.addEventListener("click", (event) => {
      const to = event.target.dataset?.page;
      if (to === "next") { this.before.push(this.after); this.after = this.next; }
      else if (to === "back") this.after = this.before.pop() || 0;
      else return;
      this.refresh();
    });
  }

  restart() { this.after = 0; this.before = []; this.refresh(); }

  async refresh() {
    const asked = { search: this.search.value, after: this.after, order: this.order.value, ...this.which };
    const page = await this.session.call("connections", asked);
    if (asked.search !== this.search.value || asked.order !== this.order.value || asked.after !== this.after) return;
    this.next = page.next;
    this.total.textContent = `${count(page.all)} here`;
    fill(this.list, missing(page), this.nodeTable("Connections",
      [["fd"], ["User"], ["Address"], ["Client"], ["Topics"], ["RTT", "num"], ["Idle", "num"], ["In / out", "num"], ["Queue", "num"], ["Since", "num"]],
      page.rows, (row) => [
        link(["connections", row.fd], row.fd), said(row.user), h("code", {}, said(row.address)), client(row), topics(row),
        row.rtt_seconds === null ? h("span.none", {}, "–") : span(row.rtt_seconds), idle(row),
        both(row.messages_received, row.messages_sent), queue(row), when(row.opened_at)],
      this.search.value ? nothing("No connection is like that", "An fd and a topic are looked for as a whole, all else by any part of it.",
        /^\d+$/.test(this.search.value.trim()) && link(["connections", this.search.value.trim()], `How fd ${this.search.value.trim()} ended`))
        : nothing("Nobody is here", "Open the page at / in another tab, and it appears here.")));
    fill(this.pages,
      this.before.length > 0 && h("button", { type: "button", "data-page": "back" }, "Back"),
      page.next > 0 && h("button", { type: "button", "data-page": "next" }, "Next 100"),
      this.order.value !== "fd" && page.rows.length >= 100 && h("span.soft", {}, "the first 100 of this order"));
  }
}

export class Connection extends View {
  build() {
    this.fd = Number(this.args[0]);
    this.state = h("div.aside");
    this.body = h("div.page");
    this.element.append(h("div.title", {}, h("h1", {}, link(["connections"], "Connections"), h("span.soft", {}, " / "), `fd ${this.fd}`), this.state), this.body);
  }

  async refresh() {
    const found = await this.session.call("connection", { fd: this.fd });
    const row = found.here || found.closed, { close } = row;
    fill(this.state,
      close ? badge("ended", "bad") : row.established ? badge("open", "good") : badge("closing", "high"),
      h("a.button", { href: `#/trace/fd/${this.fd}` }, "Trace"),
      !close && this.acts && !row.operator && h("button", { type: "button", "data-act": "push", "data-fd": this.fd }, "Push"),
      !close && this.acts && h("button.danger", { type: "button", "data-act": "kick", "data-fd": this.fd }, "Disconnect"));
    const { limits } = row;
    fill(this.body,
      close && card("How it ended", facts([
        ["Who", closer(close)], ["Code", close.code, meaning(close.code)], ["Reason", said(close.reason)],
        ["When", when(row.closed_at)], ["It was here for", span(row.closed_at - row.opened_at)],
        ["Undelivered", count(close.undelivered), "messages were queued, and never written"]])),
      h("div.two", {},
        card("Who", facts([
          this.fleet.several && ["Node", said(found.node)],
          ["User", row.user ? link(["connections", "search", `user:${row.user}`], said(row.user)) : said("")],
          ["Address", h("code", {}, said(row.address))], ["Client", client(row)],
          ["Speaks", `${row.protocol} over ${row.transport}`], ["Path", h("code", {}, said(row.path))], ["Since", when(row.opened_at)]])),
        card("Line", facts([
          ["Round trip", span(row.rtt_seconds), row.rtt_seconds === null && "no ping was answered yet"],
          ["Idle", idle(row)],
          ["Received", `${count(row.messages_received)} messages`, bytes(row.bytes_received)],
          ["Sent", `${count(row.messages_sent)} messages`, bytes(row.bytes_sent)],
          ["Dropped", count(row.messages_dropped), row.messages_dropped > 0 && "it was too slow for them"],
          ["Socket", row.blocked ? badge("takes no more", "warn") : "takes what comes"]]))),
      card("Budgets", h("div.meters", {},
        meter("Queue", row.bytes_queued, limits.bytes_queued, `${bytes(row.bytes_queued)} of ${bytes(limits.bytes_queued)}`),
        meter("Queued messages", row.messages_queued, limits.messages_queued, `${count(row.messages_queued)} of ${count(limits.messages_queued)}`),
        meter("Subscriptions", row.topic_count, limits.topics, `${count(row.topic_count)} of ${count(limits.topics)}`),
        meter("Memory", row.bytes_held, limits.bytes_held, `${bytes(row.bytes_held)} of ${bytes(limits.bytes_held)}`))),
      card(close ? "Had subscribed to" : "Subscribed to",
        table("Subscriptions", [["Topic"], ["Act", "num", true]], row.topics.map((topic) => [
          link(["topics", topic], h("code", {}, said(topic))),
          !close && this.acts ? h("button.small", { type: "button", "data-act": "unsubscribe", "data-fd": this.fd, "data-topic": topic }, "Unsubscribe") : ""]),
          nothing("No subscriptions")), h("span.soft", {}, count(row.topic_count))));
    if (close || this.tree === false) return;
    try {
      const tree = await this.session.call("tree", { fd: this.fd });
      if (!this.shown) { this.shown = h("div"); this.element.append(card("Its tasks", this.shown)); }
      fill(this.shown, h("ul.tree", {}, scope(tree, true)));
    } catch { this.tree = false; }
  }
}

const CODES = {
  1000: "normal", 1001: "going away", 1006: "no Close frame", 1008: "broke a rule", 1009: "message too big", 1011: "an error of ours",
  3000: "its own wish", 3001: "this broker stopped", 3005: "expired", 3008: "too slow", 3012: "no pong", 3013: "too many requests",
  3500: "invalid token", 3501: "bad request", 3502: "never connected", 3503: "disconnected by you", 3504: "too many of this user",
};
const meaning = (code) => CODES[code] || "";

export class Closed extends View {
  from = null;
  before = [];

  build() {
    const bar = searchBar("Search connections that have ended", "fd, user:ann, address:10.1., topic:news, client:js", () => { this.from = null; this.before = []; this.refresh(); });
    this.search = bar.input;
    this.total = h("span.soft");
    this.list = h("div");
    this.pages = h("div.pages");
    this.element.append(this.heading("Ended connections", this.total), bar.element, h("section.card.flush", {}, this.list), this.pages);
    this.pages.addEventListener("click", (event) => {
      const to = event.target.dataset?.page;
      if (to === "next") { this.before.push(this.from); this.from = this.next; }
      else if (to === "back") this.from = this.before.pop();
      else return;
      this.refresh();
    });
  }

  async refresh() {
    const asked = { search: this.search.value, before: this.from, ...this.which };
    const page = await this.session.call("closed", asked);
    if (asked.search !== this.search.value || asked.before !== this.from) return;
    this.next = page.next;
    this.total.textContent = `the last ${count(page.all)}; ${this.fleet.several ? "each node keeps 1,000" : "1,000 are kept"}`;
    fill(this.list, missing(page), this.nodeTable("Connections that have ended",
      [["fd"], ["User"], ["Address"], ["By"], ["Code", "num"], ["Reason"], ["Had subscribed to"], ["In / out", "num"], ["Undelivered", "num"], ["Lasted", "num"], ["When", "num"]],
      page.rows, (row) => [
        link(["connections", row.fd], row.fd), said(row.user), h("code", {}, said(row.address)), closer(row.close),
        h("span", { title: meaning(row.close.code) }, row.close.code), said(row.close.reason), topics(row),
        both(row.messages_received, row.messages_sent), row.close.undelivered ? h("span.warn", {}, count(row.close.undelivered)) : h("span.none", {}, "0"),
        span(row.closed_at - row.opened_at), when(row.closed_at)],
      this.search.value ? nothing("None of the last 1,000 is like that") : nothing("Nothing has ended yet", "Who closed, why, and what it had subscribed to is kept here for the last 1,000.")));
    fill(this.pages,
      this.before.length > 0 && h("button", { type: "button", "data-page": "back" }, "Back"),
      page.next && h("button", { type: "button", "data-page": "next" }, "Next 100"));
  }
}

export class Topics extends View {
  build() {
    const bar = searchBar("Search topics", "Any part of a name", () => this.refresh());
    this.search = bar.input;
    this.total = h("span.soft");
    this.list = h("div");
    this.element.append(this.heading("Topics", this.total,
      this.acts && h("button", { type: "button", "data-act": "publish" }, "Publish")), bar.element, h("section.card.flush", {}, this.list));
  }

  async refresh() {
    const search = this.search.value, page = await this.session.call("topics", { search, ...this.which });
    if (search !== this.search.value) return;
    const { several, chosen } = this.fleet, together = several && !chosen;
    this.total.textContent = page.rows.length < 100 ? `${count(page.rows.length)} with subscribers`
      : together ? "the largest of the first 100 of each node" : `the ${page.rows.length} largest of ${count(page.found)}`;
    const most = Math.max(1, ...page.rows.map((row) => row.subscribers));
    fill(this.list, missing(page), table("Topics", [["Topic"], ["Subscribers", "num"], ["Share", "share", true], ["Queue groups", "num"], ["Watch who comes", "num"], ...(together ? [["On"]] : [])],
      page.rows.map((row) => [
        h("span", {}, link(["topics", row.name], h("code", {}, said(row.name))), row.pattern && [" ", badge("pattern", "calm")]),
        count(row.subscribers), share(row.subscribers / most), row.groups || h("span.none", {}, "0"), row.watchers || h("span.none", {}, "0"), ...(together ? [h("span", {}, on(row.on))] : [])]),
      search ? nothing("No topic with subscribers is like that", "Topics that only keep history are found by their whole name: type it into the address, behind #/topics/.")
        : nothing("Nobody has subscribed", "A topic appears as soon as somebody listens to it.")));
  }
}

function share(part) {
  const bar = h("i.share");
  bar.style.width = part > 0 ? `${Math.max(1, part * 100).toFixed(1)}%` : "0";
  return bar;
}

export class Topic extends View {
  after = 0;

  build() {
    this.topic = this.args[0];
    this.body = h("div.page");
    this.element.append(h("div.title", {}, h("h1", {}, link(["topics"], "Topics"), h("span.soft", {}, " / "), said(this.topic)),
      h("div.aside", {}, link(["trace", "topic", this.topic], h("span.button", {}, "Trace")),
        this.acts && h("button", { type: "button", "data-act": "publish", "data-topic": this.topic }, "Publish"))), this.body);
    this.body.addEventListener("click", (event) => {
      const to = event.target.dataset?.page;
      if (to) { this.after = to === "next" ? this.next : 0; this.refresh(); }
    });
  }

  async refresh() {
    const found = await this.session.call("topic", { topic: this.topic, after: this.after, ...this.which });
    this.next = found.next;
    const { rules } = found;
    fill(this.body, missing(found),
      h("div.tiles.few", {},
        [["Subscribers", count(found.subscribers), found.in_program ? `${found.in_program} in the program` : "connections"],
          !found.pattern && ["Published", count(found.offset), `epoch ${found.epoch || "–"}`],
          !found.pattern && ["Keeps", count(rules.history_size), rules.history_size ? `at most, for ${span(rules.history_ttl)}` : "no history"]]
          .filter(Boolean).map(([name, value, note]) => h("div.tile", {}, h("span", {}, name), h("b.num", {}, value), h("small", {}, note)))),
      h("div.two", {},
        card("Who listens", found.pattern ? nothing("This is a pattern", "Who listens by it is found under Connections, with topic: and its name.") : [
          this.nodeTable("Subscribers", [["fd"], ["User"], ["Let in by"], ["Group"]], found.rows, (row) => [
            row.fd ? link(["connections", row.fd], row.fd) : "program", said(row.user), badge(row.by, "calm"), said(row.group)], nothing("Nobody listens")),
          h("div.pages", {}, this.after > 0 && h("button", { type: "button", "data-page": "first" }, "First"),
            found.next > 0 && h("button", { type: "button", "data-page": "next" }, "Next 100"))], this.fleet.several && h("span.soft", {}, on(found.on))),
        card("Rules", facts([
          ["May subscribe", rules.may_subscribe], ["May publish", rules.may_publish],
          ["History", rules.history_size ? `${count(rules.history_size)} for ${span(rules.history_ttl)}` : "none"],
          ["May read history", rules.may_read_history], ["Presence", rules.presence ? rules.may_read_presence : "off"],
          ["Retains the last", rules.retain ? "yes" : "no"], ["When one is slow", rules.slow_consumer]]))),
      !found.pattern && found.retained && card("Retained value", publication(found.retained)),
      !found.pattern && card("History", found.history.length ? h("ol.kept", {}, found.history.map((each) => h("li", {}, publication(each))))
        : nothing("Nothing is kept", rules.history_size ? "Nothing was published here lately." : "The rules of this topic keep no history."),
        h("span.soft", {}, "the newest first, 50 at most")));
  }
}

function publication(each) {
  return h("article.publication", {},
    h("div.meta", {}, each.offset ? h("b.num", {}, `#${each.offset}`) : h("b", {}, "last"), each.time ? when(each.time / 1000) : "",
      each.fd ? h("span", {}, "by ", link(["connections", each.fd], `fd ${each.fd}`), each.user && [" ", said(each.user)]) : h("span", {}, "by the app"),
      each.tags && Object.entries(each.tags).map(([name, value]) => badge(`${visible(name)}=${visible(value)}`, "calm")), h("span.soft", {}, bytes(each.bytes))),
    h("pre", { tabindex: 0 }, visible(each.text), each.cut && h("span.soft", {}, " … cut here")));
}

const LINES = 500;

export class Trace extends View {
  missed = 0;
  waiting = [];
  paused = false;

  build() {
    const [kind = "topic", value = ""] = this.args;
    this.kind = h("select", { id: "kind" }, ["topic", "fd", "user"].map((each) => h("option", { value: each, selected: each === kind }, each)));
    this.value = h("input", { id: "value", value, maxLength: 255, required: true, spellcheck: false, autocomplete: "off", placeholder: "news.* or 7 or ann" });
    this.note = h("span.soft", { role: "status" }, "not tracing");
    this.lines = h("ol.lines", { tabindex: 0, "aria-label": "What the trace has seen" });
    this.hold = h("button", { type: "button", onclick: () => this.pause() }, "Pause");
    const form = h("form.bar-of-tools", {
      onsubmit: (event) => { event.preventDefault(); location.hash = `#/trace/${[this.kind.value, this.value.value.trim()].map(encodeURIComponent).join("/")}`; this.begin(); },
    }, h("label.away", { htmlFor: "kind" }, "What to trace"), this.kind, h("label.away", { htmlFor: "value" }, "Its name"), this.value,
    h("button.primary", {}, "Trace"), this.hold, h("button", { type: "button", onclick: () => { this.lines.replaceChildren(); this.empty(); } }, "Clear"));
    this.element.append(this.heading("Live trace", this.note), form, h("section.card.flush", {}, this.lines));
    this.empty();
  }

  empty() { if (!this.lines.children.length) this.lines.append(h("li.empty", {}, h("strong", {}, "Nothing yet"), h("p", {}, "A trace shows what comes from one connection or user and goes to it, or what is published to a topic. Whom it looks at is not slowed down; tokens are not shown."))); }

  async refresh() { if (!this.id && this.value.value && !this.begun) await this.begin(); }

  async begin() {
    this.begun = true;
    const kind = this.kind.value, value = this.value.value.trim();
    try {
      const { trace } = await this.session.call("trace", { [kind]: kind === "fd" ? Number(value) : value });
      this.id = trace;
      const { several, here, nodes } = this.fleet;
      const where = !several ? "" : kind === "user" ? ", on the nodes that are here now" : kind === "topic" ? `, who subscribes on ${visible(nodes.get(here).name)} alone` : "";
      this.note.textContent = `tracing ${kind} ${visible(value)}${where}`;
    } catch (error) {
      this.id = null;
      this.note.textContent = error.message;
    }
  }

  told(data) {
    if (!data.trace || data.trace !== this.id) return;
    this.waiting.push(...data.entries);
    if (data.missed) this.missed += data.missed;
    if (data.ended) { this.note.textContent = data.why ? `it has ended: ${visible(data.why)}` : "it has ended"; this.id = null; }
    if (this.waiting.length > LINES) { this.missed += this.waiting.length - LINES; this.waiting.splice(0, this.waiting.length - LINES); }
    if (!this.paused) this.show();
  }

  pause() {
    this.paused = !this.paused;
    this.hold.textContent = this.paused ? "Go on" : "Pause";
    if (!this.paused) this.show();
  }

  show() {
    const { lines } = this, atEnd = lines.scrollHeight - lines.scrollTop - lines.clientHeight < 40;
    lines.querySelector(".empty")?.remove();
    const missed = this.missed;
    this.missed = 0;
    if (missed) lines.append(h("li.gap", {}, `${count(missed)} not shown: more than anybody reads`));
    for (const each of this.waiting) {
      if (each.missed) lines.append(h("li.gap", {}, `${count(each.missed)} not shown: faster than anybody reads`));
      lines.append(h("li", { class: each.kind },
        h("span.time.num", {}, new Date(each.time * 1000).toISOString().slice(11, 23)), badge(each.kind, KINDS[each.kind] ?? "calm"),
        h("span.who", {}, each.fd ? link(["connections", each.fd], `fd ${each.fd}`) : "", each.user && [" ", said(each.user)], each.topic && [" ", h("code", {}, said(each.topic))]),
        h("pre", {}, visible(each.text ?? ""), each.is_cut && h("span.soft", {}, ` … ${bytes(each.size)}`))));
    }
    this.waiting = [];
    while (lines.children.length > LINES) lines.firstChild.remove();
    if (atEnd) lines.scrollTop = lines.scrollHeight;
  }

  end() { if (this.id && this.session.state === "connected") this.session.call("untrace").catch(() => {}); }
}

const KINDS = { received: "accent", sent: "calm", published: "good", disconnected: "bad", connected: "good" };

function scope(each, alone = false) {
  const label = h("span.scope", { class: each.kind },
    h("b", {}, each.name),
    each.kind === "tasks" && h("span.soft", {}, ` ${count(each.count)} more`),
    each.deadline !== null && h("span.badge.high", {}, `ends in ${span(Math.max(0, each.deadline))}`),
    each.cancelled && badge("cancelled", "bad"), each.shielded && badge("shielded", "calm"),
    each.function && h("code.soft", {}, each.function));
  // Beside what opens and closes, as one thing to press has no other in it.
  const who = each.fd && !alone && link(["connections", each.fd], "who it is");
  return h("li", {}, who, each.children.length
    ? h("details", { open: true }, h("summary", {}, label), h("ul", {}, each.children.map((child) => scope(child))))
    : label);
}

export class Tree extends View {
  build() {
    this.body = h("div");
    this.element.append(this.heading("Nursery tree", this.whose),
      h("p.lead", {}, "Every task of this process, in the scope that ends it. What others need in order to finish is opened further out."),
      card(null, this.body));
  }

  async refresh() { fill(this.body, h("ul.tree", {}, scope(await this.session.call("tree", this.which)))); }
}

const PARTS = {
  connections: "streams, tasks and sessions", outboxes: "on its way to peers", incoming: "came, and waits",
  subscriptions: "names and filters", wills: "for when one goes", requests: "between clients", readers: "for readers in the program",
  events: "for webhooks and hooks", history: "kept for who comes back", retained: "last values", keys: "idempotency keys",
};

export class Budgets extends View {
  build() { this.body = h("div.page"); this.element.append(this.heading("Budgets", this.whose), this.body); }

  async refresh() {
    const now = await this.session.call("budgets", this.which), { memory, places } = now;
    const before = this.before, seconds = before && (performance.now() - before.at) / 1000;
    const busy = before ? Math.max(0, (now.work - before.work) / seconds / 1e6) : 0;
    this.before = { work: now.work, at: performance.now() };
    const parts = Object.entries(memory.parts).sort(([, one], [, other]) => other - one);
    fill(this.body,
      card("Memory for clients", [
        meter("All parts", memory.held, memory.limit ?? Infinity, `${bytes(memory.held)} of ${bytes(memory.limit ?? Infinity)}`),
        table("Memory by part", [["Part"], ["What it is"], ["Held", "num"], ["Share", "share", true]], parts.map(([name, size]) => [
          h("b", {}, name), h("span.soft", {}, PARTS[name] || ""), bytes(size), share(size / Math.max(1, parts[0][1]))]), nothing("Nothing is held"))],
        h("span.soft", {}, `${count(memory.gave_way)} gave way, ${count(memory.refused)} refused`)),
      h("div.two", {},
        card("Places", h("div.meters.one", {},
          meter("Connections", now.connections, places.connections, `${count(now.connections)} of ${count(places.connections)}`),
          meter("Accepted streams", now.streams, places.connections + places.guests, `${count(now.streams)} of ${count(places.connections + places.guests)}`),
          meter("History", memory.parts.history, now.history_bytes, `${bytes(memory.parts.history)} of ${bytes(now.history_bytes)}`),
          meter("Retained values", memory.parts.retained, now.retained_bytes, `${bytes(memory.parts.retained)} of ${bytes(now.retained_bytes)}`))),
        card("The event loop", facts([
          ["Busy by its own account", `${Math.round(busy * 100)} %`, "work that was charged to somebody"],
          ["Wait for their turn", count(now.turns_waiting), "sessions that used up their share"],
          ["Requests between clients", count(now.requests), "wait for an answer"],
          ["Traces", count(now.traces), "of 8 at once"],
          ["One connection may hold", bytes(now.connection_room ?? Infinity), "besides its outbox"]]))));
  }
}

export class Engine extends View {
  build() { this.body = h("div.page"); this.element.append(this.heading("Engine and nodes", this.whose), this.body); }

  async refresh() {
    const now = await this.session.call("engine", this.which), { engine } = now, { history } = engine;
    fill(this.body,
      engine.failing && h("div.card.alarm", { role: "alert" }, h("strong", {}, "Nothing is kept now: "), visible(engine.failing)),
      card("Nodes", table("Nodes", [["Name"], ["Version"], ["Up", "num"], ["Connections", "num"], ["Users", "num"], ["Subscriptions", "num"], ["Published", "num"], ["Delivered", "num"]],
        now.nodes.map((node, place) => [
          h("span", {}, h("b", {}, said(node.name)), place === 0 && [" ", badge("this page", "accent")], !node.alive && [" ", badge("does not answer", "bad")]),
          said(node.version), node.alive ? span(Math.floor(node.uptime)) : "–", count(node.connections), count(node.users), count(node.subscriptions),
          brief(node.messages_published), brief(node.messages_delivered)])),
      now.nodes.length > 1 && h("span.soft", {}, "all else on this page is of ", said(this.fleet.one.name))),
      h("div.two", {},
        card("What is kept", facts([
          ["Engine", now.kind, `survives: ${now.durability === "none" ? "nothing, it is memory" : now.durability}`],
          ["History", `${count(history.publications)} publications`, `${count(history.topics)} topics, ${bytes(history.bytes)}`],
          ["Pushed out by the bound", count(history.publications_evicted)],
          ["Retained", `${count(now.retained.values)} values`, bytes(now.retained.bytes)],
          ["Log on disk", bytes(engine.log_bytes), `${count(engine.batches)} commits`], ["On their way to it", bytes(engine.waiting)]])),
        card("Those who came back", facts([
          ...Object.entries(now.recoveries).map(([name, number]) => [name === "gap" ? "With a gap" : "Without a loss", count(number)]),
          ["Subscriptions ended by a gap", count(now.gaps)], ["Log lines dropped", count(now.log_lines_dropped)]]))),
      card("Hooks and backends", table("Hooks", [["Hook"], ["Asked"], ["Calls", "num"], ["Took on average", "num"], ["Failed", "num"]],
        now.hooks.map((each) => [h("b", {}, each.hook), each.asked, count(each.calls), each.calls ? span(each.seconds / each.calls) : "–",
          each.failures ? h("span.bad", {}, count(each.failures)) : h("span.none", {}, "0")]), nothing("No hooks are set", "Your program's hooks, and URLs in [webhooks], appear here."))),
      card("Readers of events", table("Readers of events", [["Reader"], ["Wait", "num"], ["Delivered", "num"], ["Dropped", "num"], ["Failed", "num"]],
        now.events.map((each) => [h("b", {}, each.reader), count(each.waiting), count(each.delivered), count(each.dropped), count(each.failures)]),
        nothing("Nobody reads events", "Set on_event, or webhooks.url."))));
  }
}

export class Config extends View {
  build() {
    const bar = searchBar("Search settings", "Any part of a name", () => this.show());
    this.search = bar.input;
    this.list = h("div");
    this.element.append(this.heading("Effective config", this.whose), bar.element, h("section.card.flush", {}, this.list));
  }

  async refresh() { this.rows = (await this.session.call("config", this.which)).rows; this.show(); }

  show() {
    const text = this.search.value.trim().toLowerCase();
    const rows = (this.rows || []).filter((row) => row.name.toLowerCase().includes(text));
    fill(this.list, table("Settings", [["Setting"], ["Value"], ["From"], ["Reload"]], rows.map((row) => [
      h("code", {}, row.name), h("code.value", {}, said(row.value)),
      row.source === "default" ? h("span.none", {}, "default") : badge(visible(row.source), "accent"),
      row.restart ? h("span.soft", {}, "needs a restart") : "at once"]), nothing("No setting is called so")));
  }
}
