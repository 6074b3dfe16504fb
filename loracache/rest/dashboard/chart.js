// SPDX-License-Identifier: Apache-2.0
// A line chart in SVG: axes with labels, a legend that says the values at the crosshair, or now.

import { el, setText, svg } from "./dom.js";
import { duration } from "./format.js";

const HEIGHT = 168;
const MARGIN = { left: 62, right: 10, top: 8, bottom: 22 };
const SPANS_MS = [60_000, 120_000, 300_000, 900_000];

const tidy = (text) => text.replace(/\.0+ /, " ");

/** Ticks of an axis from 0 that reaches `most`, in steps of powers of two. */
export function byteTicks(most) {
  const step = 2 ** Math.max(8, Math.ceil(Math.log2(Math.max(1, most) / 4)));
  return Array.from({ length: Math.max(2, Math.ceil(most / step)) + 1 }, (_, at) => at * step);
}

export class Chart {
  #series = [];
  #now = 0;
  #span = SPANS_MS[0];
  #at = null; // the crosshair, in milliseconds before now
  #parts = new Map();

  /** ticks(most): values of the axis; label(value): what stands beside them; value(value): in the legend. */
  constructor(host, name, { ticks, label, value = label }) {
    this.name = name;
    this.ticks = ticks;
    this.label = label;
    this.value = value;
    this.grid = svg("g", { class: "grid" });
    this.lines = svg("g");
    this.cross = svg("line", { class: "cross", y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom });
    this.svg = svg("svg", { height: HEIGHT, role: "img", tabindex: 0, "aria-label": name }, this.grid, this.lines,
      this.cross);
    this.legend = el("ul", { class: "legend" });
    this.when = el("p", { class: "when note" }, "now");
    host.append(this.svg, el("div", { class: "under" }, this.legend, this.when));
    this.#listen();
    new ResizeObserver(() => this.#paint()).observe(host);
  }

  /** series: [{name, class, points: [[time, value or null], ...]}, ...], the same times in each. */
  draw(series, now, kept) {
    this.#series = series;
    this.#now = now;
    this.#span = SPANS_MS.find((span) => span >= kept) ?? SPANS_MS.at(-1);
    this.#paint();
  }

  #listen() {
    this.svg.addEventListener("pointermove", (event) => {
      const inside = event.clientX - this.svg.getBoundingClientRect().left - MARGIN.left;
      this.#look((1 - inside / this.#width()) * this.#span);
    });
    this.svg.addEventListener("pointerleave", () => this.#look(null));
    this.svg.addEventListener("blur", () => this.#look(null));
    this.svg.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: 1, ArrowRight: -1 }[event.key];
      if (step) {
        event.preventDefault();
        this.#look((this.#at ?? 0) + (step * this.#span) / 60);
      } else if (event.key === "Escape") this.#look(null);
    });
  }

  #look(at) {
    this.#at = at === null ? null : Math.min(this.#span, Math.max(0, at));
    this.#mark();
  }

  #width() {
    return Math.max(80, this.svg.parentNode.clientWidth - MARGIN.left - MARGIN.right);
  }

  #x(time) {
    return MARGIN.left + (1 - (this.#now - time) / this.#span) * this.#width();
  }

  #paint() {
    const width = this.#width();
    const most = Math.max(0, ...this.#series.flatMap(({ points }) => points.map(([, value]) => value ?? 0)));
    const ticks = this.ticks(most);
    const high = HEIGHT - MARGIN.top - MARGIN.bottom;
    const y = (value) => MARGIN.top + high * (1 - value / ticks.at(-1));
    this.svg.setAttribute("width", width + MARGIN.left + MARGIN.right);
    this.grid.replaceChildren(...ticks.flatMap((value) => [
      svg("line", { x1: MARGIN.left, x2: MARGIN.left + width, y1: y(value), y2: y(value) }),
      svg("text", { x: MARGIN.left - 7, y: y(value) + 4, "text-anchor": "end" }, tidy(this.label(value))),
    ]), ...this.#timeLabels(width));
    this.lines.replaceChildren(...this.#series.map((each) => svg("path", { class: `line ${each.class}`,
      d: this.#path(each.points, y) })));
    this.#mark();
  }

  #timeLabels(width) {
    return [1, 0.5, 0].map((part) => svg("text", { x: MARGIN.left + (1 - part) * width, y: HEIGHT - 5,
      "text-anchor": part === 1 ? "start" : part ? "middle" : "end" },
    part ? `−${duration((part * this.#span) / 1000)}` : "now"));
  }

  #path(points, y) {
    let pen = "M";
    const steps = [];
    for (const [time, value] of points) {
      if (value === null || this.#now - time > this.#span) {
        pen = "M";
        continue;
      }
      steps.push(`${pen}${this.#x(time).toFixed(1)} ${y(value).toFixed(1)}`);
      pen = "L";
    }
    return steps.join("");
  }

  /** Say the values at the crosshair. */
  #mark() {
    const points = this.#series[0]?.points ?? [];
    let place = points.length - 1;
    if (this.#at !== null) {
      const time = this.#now - this.#at;
      const far = (at) => Math.abs(points[at][0] - time);
      for (let at = points.length - 1; at >= 0; at -= 1) if (far(at) < far(place)) place = at;
    }
    const shown = this.#at !== null && place >= 0;
    this.cross.classList.toggle("shown", shown);
    if (shown) {
      const x = this.#x(points[place][0]);
      this.cross.setAttribute("x1", x);
      this.cross.setAttribute("x2", x);
    }
    setText(this.when, shown ? `${duration((this.#now - points[place][0]) / 1000)} ago` : "now");
    const values = this.#series.map((each) => [each, each.points[place]?.[1]]);
    const text = (value, none) => (typeof value === "number" ? this.value(value) : none);
    for (const [each, value] of values) setText(this.#entry(each), text(value, "–"));
    for (const [name, part] of this.#parts) {
      if (!this.#series.some((each) => each.name === name)) {
        part.item.remove();
        this.#parts.delete(name);
      }
    }
    const said = values.map(([each, value]) => `${each.name} ${text(value, "none")}`);
    this.svg.setAttribute("aria-label", `${this.name}: ${said.join(", ")}; arrow keys look back`);
  }

  #entry(series) {
    if (!this.#parts.has(series.name)) {
      const value = el("b", {});
      const swatch = svg("svg", { class: "swatch", width: 18, height: 8, "aria-hidden": "true" },
        svg("path", { class: `line ${series.class}`, d: "M0 4H18" }));
      const item = el("li", {}, swatch, el("span", {}, series.name), value);
      this.#parts.set(series.name, { item, value });
      this.legend.append(item);
    }
    return this.#parts.get(series.name).value;
  }
}
