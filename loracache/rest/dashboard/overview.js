// SPDX-License-Identifier: Apache-2.0
// What the statistics say: tiers, lookups, evictions, leases, failures, and how they went over the last minutes.

import { byteTicks, Chart } from "./chart.js";
import { byId, el, setHidden, setRows, setText } from "./dom.js";
import { bytes, clock, count, duration, exact, exactBytes, moment, percent, plural, rate } from "./format.js";
import { History } from "./history.js";

const RECENT_MS = 5 * 60_000;
const NAMES = { cpu: "CPU memory", disk: "Disk", redis: "Redis" };
const SUMS = [{ head: true }, { number: true }];
const FAILURES = [{ label: "time" }, { label: "tier" }, { label: "cause" }, { label: "count", number: true }];
const FLOWS = [ // name, counter, class: a tier has a colour, writing to it is dashed
  ["stored by engines", "store.bytes", "cpu"],
  ["disk read", "load.disk.bytes", "disk"],
  ["disk written", "write.disk.bytes", "disk dashed"],
  ["redis read", "load.redis.bytes", "redis"],
  ["redis written", "write.redis.bytes", "redis dashed"],
];

const history = new History();
const cards = new Map();
const charts = {};

/** The tiers that the daemon has, as last said. */
export let tiers = ["cpu", "disk", "redis"];

export function setUp() {
  charts.hits = new Chart(byId("hit-rate").querySelector(".chart"), "hit rate", {
    ticks: () => [0, 0.25, 0.5, 0.75, 1], label: (part) => `${Math.round(part * 100)} %`, value: percent });
  charts.flow = new Chart(byId("throughput").querySelector(".chart"), "throughput", { ticks: byteTicks, label: rate });
}

/** Show statistics as /v1/stats answered them at `now` (milliseconds of the page's clock). */
export function show(stats, now) {
  tiers = Object.keys(stats.tiers);
  history.add(stats, now);
  setText(byId("version"), stats.version);
  setText(byId("uptime"), duration(stats.uptime_s), `${exact(stats.uptime_s)} s`);
  setText(byId("connections"), exact(stats.connections));
  showTiers(stats.tiers);
  showCharts(stats, now);
  showCounts(stats);
  showFailures(stats);
}

function showTiers(said) {
  for (const [name, values] of Object.entries(said)) {
    if (!cards.has(name)) {
      cards.set(name, card(name));
      byId("tiers").append(cards.get(name).root);
    }
    cards.get(name).show(values);
  }
  for (const [name, { root }] of cards) {
    if (!(name in said)) {
      root.remove();
      cards.delete(name);
    }
  }
}

/** One tier: what it holds, how full it is, what waits. */
function card(name) {
  const state = el("p", { class: "badge" });
  const fill = el("div", { class: "fill" });
  const meter = el("div", { class: "meter", role: "meter", "aria-valuemin": 0, "aria-valuemax": 100,
    "aria-label": `${NAMES[name] ?? name}: how full` }, fill);
  const facts = el("dl", { class: "figures" });
  const values = new Map();
  const root = el("article", { class: `panel card ${name}`, data: { tier: name } },
    el("header", {}, el("h2", {}, NAMES[name] ?? name), state), meter, facts,
    name === "redis" ? el("p", { class: "note" }, "What it holds, for other machines too, it counts itself.") : "");
  const figure = (label, field, text, title) => {
    if (!values.has(field)) {
      values.set(field, el("dd", { data: { field } }));
      facts.append(el("div", {}, el("dt", {}, label), values.get(field)));
    }
    setText(values.get(field), text, title);
  };
  return { root, show: (said) => {
    const there = said.available !== false;
    const scanning = said.scanned === false;
    const readOnly = said.writable === false;
    setText(state, !there ? "not in use" : scanning ? "being scanned" : readOnly ? "read only" : "available",
      said.reason ?? "");
    state.dataset.state = !there ? "bad" : scanning || readOnly ? "waiting" : "good";
    setHidden(meter, !said.limit_bytes);
    if (said.limit_bytes) {
      const part = said.used_bytes / said.limit_bytes;
      fill.style.width = `${Math.min(100, part * 100)}%`;
      meter.setAttribute("aria-valuenow", (part * 100).toFixed(1));
      figure("used", "used_bytes", `${bytes(said.used_bytes)} of ${bytes(said.limit_bytes)} · ${percent(part)}`,
        `${exactBytes(said.used_bytes)} of ${exact(said.limit_bytes)}`);
    }
    if (said.objects !== undefined) figure("objects", "objects", count(said.objects), exact(said.objects));
    if (said.bytes !== undefined) figure("payload", "bytes", bytes(said.bytes), exactBytes(said.bytes));
    if (said.queued_writes !== undefined) {
      figure("queued writes", "queued_writes", count(said.queued_writes), exact(said.queued_writes));
    }
    if (said.waiting !== undefined) {
      const parts = Object.entries(said.waiting);
      figure("calls waiting", "waiting", count(parts.reduce((total, [, calls]) => total + calls, 0)),
        parts.map(([what, calls]) => `${what} ${exact(calls)}`).join(", "));
    }
    if (said.populated_bytes !== undefined) {
      figure("populated", "populated_bytes", bytes(said.populated_bytes), exactBytes(said.populated_bytes));
    }
    if (said.huge_bytes !== undefined) {
      figure("in huge pages", "huge_bytes", bytes(said.huge_bytes), exactBytes(said.huge_bytes));
    }
    if (said.direct_io !== undefined) figure("direct I/O", "direct_io", said.direct_io ? "yes" : "no");
  } };
}

function showCharts(stats, now) {
  const span = history.span(now);
  charts.hits.draw([{ name: "of keys looked up, over 30 s", class: "hits", points: history.hitRate() }], now, span);
  const flows = FLOWS.filter(([, counter]) => counter === "store.bytes" || counter.split(".")[1] in stats.tiers);
  charts.flow.draw(flows.map(([name, counter, look]) => ({ name, class: look, points: history.rateOf(counter) })), now,
    span);
  const { hits, misses } = history.looked(now, RECENT_MS);
  const over = `in the last ${duration(Math.min(RECENT_MS, span) / 1000)}`;
  const asked = hits + misses;
  setText(byId("hit-summary"), asked ? `${percent(hits / asked)} ${over}` : `no lookups ${over}`,
    `${exact(hits)} of ${exact(asked)} keys`);
}

function showCounts({ hits, misses, evicted, not_admitted: unwritten, ...stats }) {
  const found = Object.entries(hits).map(([tier, value]) => [[`hit in ${tier}`, ""], [count(value), exact(value)]]);
  const not = Object.entries(misses).map(([cause, value]) => [[`miss: ${words(cause)}`, ""],
    [count(value), exact(value)]]);
  setRows(byId("lookups").querySelector("tbody"), SUMS, [...found, ...not], "none yet");
  showReasons("evictions", evicted, "none yet");
  showReasons("unwritten", unwritten, "none");
  setRows(byId("use").querySelector("tbody"), SUMS, [
    ["leases", stats.leases], ["leased objects", stats.leased_objects], ["quarantined", stats.quarantined_bytes, true],
    ["namespaces", stats.namespaces], ["operations running", stats.operations],
  ].map(([name, value, size]) => [[name, ""],
    size ? [bytes(value), exactBytes(value)] : [count(value), exact(value)]]), "");
}

/** Counts by tier and reason. */
function showReasons(id, byTier, none) {
  const rows = Object.entries(byTier).flatMap(([tier, reasons]) => Object.entries(reasons).map(([reason, value]) =>
    [[`${tier}: ${words(reason)}`, ""], [count(value), exact(value)]]));
  setRows(byId(id).querySelector("tbody"), SUMS, rows, none);
}

function showFailures({ recent_failures: failures }) {
  const rows = failures.toReversed().map((each) => [
    [clock(each.time), moment(each.time)], [each.tier, ""], [words(each.cause), each.cause],
    [count(each.count), exact(each.count)],
  ]);
  setRows(byId("failures").querySelector("tbody"), FAILURES, rows, "nothing failed since the daemon started");
  setText(byId("failures-note"), failures.length ? `the last ${plural(failures.length, "kind")} of failure` : "");
}

export function words(cause) {
  return cause.replaceAll("_", " ").replaceAll(".", ": ");
}
