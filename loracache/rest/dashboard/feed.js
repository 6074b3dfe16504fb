// SPDX-License-Identifier: Apache-2.0
// Events as they happen. Read with fetch, because an EventSource cannot send a token; taken up again behind the last
// number, and left alone while nobody looks.

import { Problem, reach, token } from "./api.js";
import { byId, el, setText } from "./dom.js";
import { bytes, clock, exact, exactBytes, moment, shortKey } from "./format.js";
import { words } from "./overview.js";

const KEPT = 100;
const PAINT_MS = 500;
const RETRY_MS = 2000;
const MOST_CHARACTERS = 4 << 20; // of one event that does not end

export class Feed {
  #last = "";
  #waiting = []; // events that are not on the page yet, the latest last
  #stopped = null; // of the stream that is read
  #paused = false;
  #painting = 0;
  #total = 0;

  /** find(key): called when somebody wants to see an object. */
  constructor(find) {
    this.find = find;
    this.body = byId("events").querySelector("tbody");
    const button = byId("events-pause");
    button.addEventListener("click", () => {
      this.#paused = !this.#paused;
      button.setAttribute("aria-pressed", String(this.#paused));
      setText(button, this.#paused ? "Go on" : "Pause");
      this.restart();
    });
    document.addEventListener("visibilitychange", () => this.restart());
  }

  /** Begin to listen, or with another token. */
  restart() {
    this.#stopped?.abort();
    this.#stopped = null;
    if (this.#paused || document.hidden) {
      setText(byId("events-note"), "paused; what happens meanwhile is shown when you go on");
      return;
    }
    const stopped = new AbortController();
    this.#stopped = stopped;
    this.#listen(stopped.signal);
  }

  async #listen(signal) {
    while (!signal.aborted) {
      let wait = RETRY_MS;
      try {
        await this.#read(signal);
        this.#note("the stream ended; asking again", signal);
      } catch (problem) {
        if (signal.aborted) return;
        if (!(problem instanceof Problem)) this.#note("the stream broke off; asking again", signal);
        else {
          this.#note(`not connected: ${problem.message}`, signal);
          if ([401, 403].includes(problem.status)) return; // until somebody signs in
          wait = Math.max(wait, problem.retryAfter * 1000);
        }
      }
      await new Promise((resume) => setTimeout(resume, wait));
    }
  }

  async #read(signal) {
    const headers = { accept: "text/event-stream" };
    if (token.get()) headers.authorization = `Bearer ${token.get()}`;
    if (this.#last) headers["last-event-id"] = this.#last;
    const answer = await reach("v1/events", { headers, signal, cache: "no-store", credentials: "omit" });
    this.#note("live", signal);
    let rest = "";
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      rest += value;
      if (rest.length > MOST_CHARACTERS) throw new Problem(0, "an event has no end");
      const events = rest.split("\n\n");
      rest = events.pop();
      for (const event of events) this.#take(event);
    }
  }

  #note(text, signal) {
    if (!signal.aborted) setText(byId("events-note"), text);
  }

  #take(text) {
    const fields = {};
    for (const line of text.split("\n")) {
      const colon = line.indexOf(":");
      if (colon > 0) fields[line.slice(0, colon)] = line.slice(colon + 1).trimStart();
    }
    if (fields.event === "lost") this.#put({ event: "lost", count: Number(fields.data), time: Date.now() / 1000 });
    else if (fields.id && fields.data) {
      this.#last = fields.id;
      this.#put(JSON.parse(fields.data));
    }
  }

  /** Onto the page, with whatever else comes in the next half second. */
  #put(event) {
    this.#total += 1;
    this.#waiting.push(event);
    if (this.#waiting.length > KEPT) this.#waiting.shift();
    this.#painting ||= setTimeout(() => {
      this.#painting = 0;
      this.#paint();
    }, PAINT_MS);
  }

  #paint() {
    const rows = this.#waiting.map((event) => this.#row(event)).reverse();
    this.#waiting = [];
    this.body.prepend(...rows);
    while (this.body.children.length > KEPT) this.body.lastChild.remove();
    if (!this.#paused && !document.hidden) setText(byId("events-note"), `live, ${exact(this.#total)} seen`);
  }

  #row(event) {
    if (event.event === "lost") {
      const text = `${exact(event.count)} events are lost: too many to read`;
      return el("tr", { class: "empty" }, el("td", { colspan: 6 }, text));
    }
    const cell = (label, text, title, look) => el("td", { class: look, title, data: { label } }, text);
    const object = event.key ? el("button", { type: "button", class: "key", title: event.key,
      on: { click: () => this.find(event.key) } }, shortKey(event.key)) : `${exact(event.count)} together`;
    return el("tr", { data: { event: event.event } }, cell("time", clock(event.time), moment(event.time)),
      cell("event", event.event), cell("tier", event.tier), cell("cause", words(event.cause), event.cause),
      cell("object", object),
      cell("bytes", event.bytes ? bytes(event.bytes) : "–", exactBytes(event.bytes), "number"));
  }
}
