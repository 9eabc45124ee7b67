// The nodes that are one broker: the samples of each and their sums, and which of them the pages are about.
// Times are those of each node's own clock, so sums take what a node last said, for as long as STALE.

import { Samples, WINDOW } from "./charts.js";

const STALE = 10;

// The samples of several nodes as those of one: what it has is as in Samples.
class Sum {
  #parts;
  #times = [];
  #places;

  constructor(parts) {
    this.#parts = parts.filter(({ rows }) => rows.length);
    if (!this.#parts.length) { this.#places = []; return; }
    const end = Math.ceil(Math.max(...this.#parts.map((each) => each.last.time)));
    const start = Math.ceil(Math.min(...this.#parts.map((each) => each.at(0).time)));
    for (let time = Math.max(start, end - WINDOW); time <= end; time += 1) this.#times.push(time);
    this.#places = this.#parts.map((part) => this.#placesOf(part.column("time")));
  }

  // By each of the times, the place of the last row until then; -1 where that is too long ago.
  #placesOf(column) {
    let place = -1;
    return this.#times.map((time) => {
      while (place + 1 < column.length && column[place + 1] <= time) place += 1;
      return place >= 0 && time - column[place] <= STALE ? place : -1;
    });
  }

  #join(columns, name) {
    const join = name === "lag" ? (all) => Math.max(...all) : (all) => all.reduce((one, other) => one + other, 0);
    return this.#times.map((_, at) => {
      const values = columns.map((column, part) => this.#places[part][at] < 0 ? null : column[this.#places[part][at]]).filter((value) => value !== null);
      return values.length ? join(values) : null;
    });
  }

  get #fresh() { return this.#parts.filter((_, part) => this.#places[part].at(-1) >= 0); }

  get last() {
    const fresh = this.#fresh;
    if (!fresh.length) return undefined;
    const sum = { time: this.#times.at(-1) };
    for (const name of fresh[0].fields) {
      if (name === "time") continue;
      const values = fresh.map((each) => each.last[name] ?? 0);
      sum[name] = name === "lag" ? Math.max(...values) : values.reduce((one, other) => one + other, 0);
    }
    return sum;
  }

  rate(name) { return this.#fresh.reduce((sum, each) => sum + each.rate(name), 0); }
  column(name) { return name === "time" ? this.#times : this.#join(this.#parts.map((each) => each.column(name)), name); }
  rates(name) { return this.#join(this.#parts.map((each) => each.rates(name)), name); }
}

export class Fleet {
  nodes = new Map();
  here = "";
  chosen = "";

  get several() { return this.nodes.size > 1; }
  get all() { return [...this.nodes.values()]; }

  // The node that pages are about which are of one alone.
  get one() { return this.nodes.get(this.chosen) || this.nodes.get(this.here); }

  // Those that lists and sums are about.
  get shown() { return this.chosen ? [this.one] : this.all; }

  get samples() { return this.several && !this.chosen ? new Sum(this.shown.map((each) => each.samples)) : this.one.samples; }

  limit(name) { return this.shown.reduce((sum, { facts }) => sum + (facts ? facts[name] ?? Infinity : 0), 0); }

  // The page came, or came back: perhaps from another node.
  begin(facts) {
    this.nodes = new Map();
    this.here = facts.id;
    this.#know({ id: facts.id, name: facts.node }).facts = facts;
    this.nodes.get(facts.id).samples.reset(facts.samples);
  }

  // Who is there now, with the last sample of each. Returns whether others are there than before.
  async refresh(session) {
    const { nodes } = await session.call("ticks"), before = [...this.nodes.keys()].join();
    const there = new Set(nodes.map(({ id }) => id));
    for (const id of this.nodes.keys()) if (!there.has(id) && id !== this.here) this.nodes.delete(id);
    if (!this.nodes.has(this.chosen)) this.chosen = "";
    for (const { id, name, tick, reason } of nodes) {
      const node = this.#know({ id, name });
      node.reason = reason || "";
      if (!node.facts && !reason) await this.#enter(session, node);
      else if (id !== this.here && tick) this.add(id, tick);
    }
    return before !== [...this.nodes.keys()].join();
  }

  add(id, row) {
    const node = this.nodes.get(id), time = node?.samples.last?.time ?? 0;
    if (node && row[0] > time) node.samples.add(row);
  }

  async #enter(session, node) {
    try {
      node.facts = await session.call("overview", { node: node.id });
      node.samples.reset(node.facts.samples);
    } catch (error) { node.reason = error.message; }
  }

  #know({ id, name }) {
    if (!this.nodes.has(id)) this.nodes.set(id, { id, name, facts: null, samples: new Samples(), reason: "" });
    return this.nodes.get(id);
  }
}
