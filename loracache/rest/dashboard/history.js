// SPDX-License-Identifier: Apache-2.0
// What the counters did over the last minutes: differences of the statistics that were polled, at most 15 minutes of
// them. Times are milliseconds of the page's own clock, which never jumps.

export const KEPT_MS = 15 * 60_000;
const MOST = 1000; // samples, however often somebody polls
const SMOOTH_MS = 30_000; // hit rate at a moment: of the lookups of the time before

const sum = (numbers) => Object.values(numbers).reduce((total, each) => total + each, 0);

export class History {
  #samples = [];
  #last = null;
  #since = null;

  /** Take in statistics as /v1/stats answers them. */
  add(stats, now) {
    const last = this.#last;
    this.#since ??= now;
    this.#last = { now, uptime: stats.uptime_s, counters: stats.counters, hits: sum(stats.hits),
      misses: sum(stats.misses) };
    // A daemon that was started again counts from nothing: the line has a gap there.
    if (!last || stats.uptime_s < last.uptime || now <= last.now) {
      if (this.#samples.length) this.#samples.push({ now, gap: true, hits: 0, misses: 0, rates: {} });
      return;
    }
    const seconds = (now - last.now) / 1000;
    const rates = {};
    for (const [name, value] of Object.entries(stats.counters)) {
      if (name.endsWith(".bytes")) rates[name] = Math.max(0, value - (last.counters[name] ?? 0)) / seconds;
    }
    this.#samples.push({ now, gap: false, hits: this.#last.hits - last.hits, misses: this.#last.misses - last.misses,
      rates });
    while (this.#samples.length > MOST || now - this.#samples[0].now > KEPT_MS) this.#samples.shift();
  }

  /** How far back it goes, in milliseconds. */
  span(now) {
    return Math.min(KEPT_MS, now - this.#since);
  }

  /** Hits and misses of the last `ms`. */
  looked(now, ms) {
    const among = this.#samples.filter((sample) => now - sample.now <= ms);
    return { hits: among.reduce((total, each) => total + each.hits, 0),
      misses: among.reduce((total, each) => total + each.misses, 0) };
  }

  /** [time, bytes a second or null] of a counter. */
  rateOf(name) {
    return this.#samples.map((sample) => [sample.now, sample.gap ? null : sample.rates[name] ?? 0]);
  }

  /** [time, part of the keys found or null] */
  hitRate() {
    let start = 0;
    let hits = 0;
    let asked = 0;
    return this.#samples.map((sample) => {
      hits += sample.hits;
      asked += sample.hits + sample.misses;
      while (sample.now - this.#samples[start].now > SMOOTH_MS) {
        hits -= this.#samples[start].hits;
        asked -= this.#samples[start].hits + this.#samples[start].misses;
        start += 1;
      }
      return [sample.now, asked && !sample.gap ? hits / asked : null];
    });
  }
}
