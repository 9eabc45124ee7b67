// Charts of the samples: what grows is shown as a rate. uPlot draws them on a canvas.

import { brief, bytes, h, span } from "./dom.js";

export const WINDOW = 900;

// The samples that came, as columns by name.
export class Samples {
  fields = [];
  rows = [];

  reset({ fields, rows }) { this.fields = fields; this.rows = rows; }
  add(row) { this.rows.push(row); if (this.rows.length > WINDOW) this.rows.shift(); }
  get last() { return this.at(-1); }

  at(place) {
    const row = this.rows.at(place);
    return row && Object.fromEntries(this.fields.map((name, column) => [name, row[column]]));
  }

  // What a counter has grown by, a second, over the last few samples.
  rate(name, samples = 3) {
    const to = this.last, from = this.at(-1 - Math.min(samples, this.rows.length - 1));
    const seconds = to && from ? to.time - from.time : 0;
    return seconds > 0 ? Math.max(0, (to[name] - from[name]) / seconds) : 0;
  }

  column(name) { const place = this.fields.indexOf(name); return this.rows.map((row) => row[place]); }

  rates(name) {
    const time = this.column("time"), values = this.column(name);
    return values.map((value, place) => place === 0 ? null
      : Math.max(0, (value - values[place - 1]) / Math.max(0.001, time[place] - time[place - 1])));
  }
}

const SHOWN = { count: brief, bytes, span: (value) => span(value), part: (value) => `${Math.round(value * 100)} %` };
const TICKS = {
  count: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6, 2e6, 5e6, 1e7, 1e8],
  bytes: Array.from({ length: 40 }, (_, power) => 2 ** power),
};

export class Chart {
  // Series are [name, unit-less label, from the samples to values].
  constructor(title, kind, series) {
    this.kind = kind;
    this.series = series;
    this.place = h("div.plot", { role: "img", "aria-label": title });
    this.legend = h("div.legend", {}, series.map(({ label }, number) =>
      h("span", {}, h("i", { class: `ink c${number + 1}` }), label, h("b.num", {}, "–"))));
    this.element = h("section.card.chart", {}, h("div.head", {}, h("h2", {}, title), this.legend), this.place);
    this.title = title;
    this.seen = new ResizeObserver(() => this.#fit());
    this.seen.observe(this.place);
  }

  draw(samples) {
    if (!this.place.isConnected || !this.place.clientWidth) return;
    const data = [samples.column("time"), ...this.series.map(({ values }) => values(samples))];
    if (!this.plot) this.#make(data);
    else this.plot.setData(data);
    const shown = this.series.map((each, number) => SHOWN[this.kind](data[number + 1].at(-1) ?? 0));
    this.legend.querySelectorAll("b").forEach((cell, number) => { cell.textContent = shown[number]; });
    this.place.setAttribute("aria-label", `${this.title}: ${this.series.map(({ label }, number) => `${label} ${shown[number]}`).join(", ")}`);
  }

  // Colours come from the style sheet, which knows whether it is light or dark.
  repaint() { this.plot?.destroy(); this.plot = null; }

  end() { this.seen.disconnect(); this.repaint(); }

  #fit() { this.plot?.setSize({ width: this.place.clientWidth, height: this.place.clientHeight }); }

  #colour(name) {
    const probe = h("i", { class: `ink ${name}` });
    this.place.append(probe);
    const colour = getComputedStyle(probe).color;
    probe.remove();
    return colour;
  }

  #make(data) {
    const show = SHOWN[this.kind], soft = this.#colour("soft"), line = this.#colour("line");
    const font = `11px ${getComputedStyle(document.body).fontFamily}`;
    const axis = { stroke: soft, font, ticks: { show: false }, grid: { stroke: line, width: 1 } };
    this.plot = new uPlot({
      width: this.place.clientWidth, height: this.place.clientHeight, padding: [8, 20, 0, 0],
      legend: { show: false },
      cursor: { y: false, drag: { x: false, y: false }, points: { size: 7 } },
      scales: {
        x: { range: (_, low, high) => [Math.max(low, high - WINDOW), high] },
        y: { range: (_, low, high) => [0, high > 0 ? high * 1.15 : this.kind === "span" ? 0.01 : 1] },
      },
      axes: [
        { ...axis, size: 26, space: 80, grid: { show: false },
          values: (_, ticks) => ticks.map((tick) => new Date(tick * 1000).toTimeString().slice(0, 5)),
          incrs: [60, 120, 300, 600] },
        { ...axis, size: 58, space: 34, values: (_, ticks) => ticks.map((tick) => show(tick)),
          ...(TICKS[this.kind] ? { incrs: TICKS[this.kind] } : {}) },
      ],
      series: [
        {},
        ...this.series.map(({ label }, number) => {
          const stroke = this.#colour(`c${number + 1}`);
          return { label, stroke, width: 1.75, points: { show: false }, spanGaps: true,
            fill: number === 0 ? stroke.replace("rgb(", "rgba(").replace(")", ", .10)") : undefined };
        }),
      ],
      hooks: {
        setCursor: [(plot) => {
          const place = plot.cursor.idx;
          if (place === null || place === undefined) return;
          this.legend.querySelectorAll("b").forEach((cell, number) => { cell.textContent = show(plot.data[number + 1][place] ?? 0); });
        }],
      },
    }, data, this.place);
  }
}
