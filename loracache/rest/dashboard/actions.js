// SPDX-License-Identifier: Apache-2.0
// Pin, unpin, evict, move: a dialog says what will happen to what. Nothing is sent before somebody agrees to that.

import { post, Problem } from "./api.js";
import { byId, el, setHidden, setText } from "./dom.js";
import { bytes, plural } from "./format.js";
import { tiers } from "./overview.js";
import { NOTHING, amount, held } from "./targets.js";

const CAUSES = {
  held: "leased, pinned, named, or needed by what is", absent: "not in that tier", already: "there already",
  stays: "could not leave the tier it was in", not_written: "not written", full: "no room",
};
const STATES = { running: "Goes on, see Operations. By now", done: "Done", failed: "Failed", cancelled: "Cancelled" };
const LOCAL = ["cpu", "disk"];
const WAIT_S = 5; // after that it goes on under Operations
const here = () => LOCAL.filter((tier) => tiers.includes(tier));

/** Of each verb: fields; problem(values), where they will not do; says(values, title); note; about(values): the tiers;
 *  body(values): of the request; label(values): on the button. */
const VERBS = {
  pin: {
    fields: () => [choice("tier", "Keep in", here()), number("ttl", "For how many seconds (empty: until unpinned)")],
    problem: ({ ttl }) => (ttl !== null && !(ttl > 0 && ttl <= 3600) ? "Give 1 to 3600 seconds, or none." : ""),
    says: ({ tier, ttl }, title) => `Keeps ${title} in ${tier} ${ttl === null ? "until it is unpinned" :
      `for ${plural(ttl, "second")}`}.`,
    note: "What is not in that tier is skipped.",
    about: ({ tier }) => [tier],
    body: ({ tier, ttl }) => (ttl === null ? { tier } : { tier, ttl }),
    label: () => "Pin",
  },
  unpin: {
    fields: () => [choice("tier", "No longer keep in", here())],
    says: ({ tier }, title) => `Ends pins of ${title} in ${tier}.`,
    note: "What was pinned may be evicted from then on.",
    about: ({ tier }) => [tier],
    body: ({ tier }) => ({ tier }),
    label: () => "Unpin",
  },
  evict: {
    fields: () => [boxes("tiers", "From", tiers)],
    problem: (values) => (values.tiers.length ? "" : "Choose one tier at least."),
    says: (values, title) => `Removes ${title} from ${values.tiers.join(", ") || "no tier"}.`,
    note: "What is leased, pinned, named, or needed by what is, stays and is counted as skipped.",
    about: (values) => values.tiers,
    body: (values) => ({ tiers: values.tiers }),
    label: (values) => `Evict from ${values.tiers.join(", ")}`,
  },
  move: {
    fields: () => [choice("source", "From", tiers), choice("tier", "To", tiers, 1),
      choice("keep", "At the source it is", ["removed", "kept"])],
    problem: ({ source, tier }) => (source === tier ? "Choose two tiers." : ""),
    says: ({ source, tier, keep }, title) => (keep === "kept" ?
      `Copies ${title} from ${source} to ${tier}; it stays in ${source} too.` :
      `Brings ${title} from ${source} to ${tier} and removes it from ${source}.`),
    about: ({ source }) => [source],
    body: ({ source, tier, keep }) => ({ source, tier, keep: keep === "kept" }),
    label: ({ keep }) => (keep === "kept" ? "Copy" : "Move"),
  },
};
const TITLES = { pin: "Pin", unpin: "Unpin", evict: "Evict", move: "Move or copy" };

let current = null;

export function setUp() {
  byId("action-cancel").addEventListener("click", () => byId("action").close());
  byId("action-confirm").addEventListener("click", () => current?.confirm());
  byId("action").addEventListener("close", () => current?.closed());
}

/** Resolves, when the dialog is closed, to whether something was sent and taken. */
export function openAction(verb, target) {
  return new Promise((resolve) => {
    const asked = new Asked(verb, target, resolve);
    current = asked;
    asked.open();
  });
}

class Asked {
  #sent = false;
  #held = null; // tier -> {objects, bytes}
  #below = null;
  #opener = document.activeElement;

  constructor(name, target, resolve) {
    this.name = name;
    this.verb = VERBS[name];
    this.target = target;
    this.resolve = resolve;
    this.fields = this.verb.fields();
    this.says = el("p", { class: "says" });
    this.about = el("p", { class: "about" }, "Asking how much that is …");
    this.wrong = el("p", { class: "wrong", role: "alert" });
  }

  get values() {
    return Object.fromEntries(this.fields.map(({ name, read }) => [name, read()]));
  }

  open() {
    setText(byId("action-title"), `${TITLES[this.name]}: ${this.target.title}`);
    const fields = el("div", { class: "fields", on: { input: () => this.#explain() } },
      ...this.fields.map(({ node }) => node));
    byId("action-body").replaceChildren(fields, this.says, this.about,
      ...[this.verb.note, this.target.caution].filter(Boolean).map((text) => el("p", { class: "note" }, text)),
      this.wrong);
    setText(byId("action-result"), "");
    byId("action-result").dataset.state = "";
    setHidden(byId("action-confirm"), false);
    setText(byId("action-cancel"), "Cancel");
    this.#explain();
    byId("action").showModal();
    this.#count();
  }

  async #count() {
    const { own, below, selector } = this.target;
    try {
      this.#held = own ?? await held(selector);
      if (below && this.name === "evict") this.#below = await held(below);
    } catch (problem) {
      if (current !== this) return;
      if (!(problem instanceof Problem)) throw problem;
      setText(this.about, `How much that is, is not known: ${problem.message}`);
      return;
    }
    if (current === this) this.#explain();
  }

  /** Say what would happen with the fields as they are. */
  #explain() {
    const values = this.values;
    const problem = this.verb.problem?.(values) ?? "";
    setText(this.wrong, problem);
    setText(this.says, this.verb.says(values, this.target.title));
    setText(byId("action-confirm"), this.verb.label(values));
    byId("action-confirm").disabled = problem !== "";
    if (!this.#held) return;
    const about = this.verb.about(values);
    const parts = (held) => about.map((tier) => (LOCAL.includes(tier) ? `${amount(held[tier] ?? NOTHING)} in ${tier}` :
      `${tier} does not say`)).join("; ");
    const along = this.name === "evict" ? this.target.whatBelow : "";
    const much = this.#below ? `: ${parts(this.#below)}` : "";
    setText(this.about, `Now there: ${parts(this.#held)}.${along ? ` With it goes ${along}${much}.` : ""}`);
  }

  async confirm() {
    const button = byId("action-confirm");
    const result = byId("action-result");
    button.disabled = true;
    result.dataset.state = "";
    setText(result, "Sent …");
    let operation;
    try {
      const body = { selector: this.target.selector, ...this.verb.body(this.values) };
      operation = await post(`v1/${this.name}?wait=${WAIT_S}`, body);
    } catch (problem) {
      if (!(problem instanceof Problem)) throw problem;
      if (current !== this) return;
      result.dataset.state = "bad";
      setText(result, `Not done: ${problem.message}`);
      button.disabled = false;
      return;
    }
    this.#sent = true;
    if (current !== this) {
      this.resolve(true);
      return;
    }
    setHidden(button, true);
    setText(byId("action-cancel"), "Close");
    byId("action-cancel").focus();
    result.dataset.state = operation.error ? "bad" : "good";
    setText(result, outcome(operation));
  }

  closed() {
    current = null;
    if (this.#opener?.isConnected) this.#opener.focus();
    this.resolve(this.#sent);
  }
}

/** What came of an operation, in words. */
export function outcome({ state, objects, bytes: size, skipped, causes, error }) {
  const sized = size ? `, ${bytes(size)}` : "";
  const left = Object.entries(causes).map(([cause, many]) => `${many} ${CAUSES[cause] ?? cause.replaceAll("_", " ")}`);
  return `${STATES[state] ?? state}: ${plural(objects, "object")}${sized}.${skipped ?
    ` Skipped ${skipped}: ${left.join("; ")}.` : ""}${error ? ` ${error}` : ""}`;
}

function choice(name, label, options, selected = 0) {
  const select = el("select", { name }, ...options.map((option, at) =>
    el("option", { value: option, selected: at === selected }, option)));
  return { name, read: () => select.value, node: el("label", {}, el("span", {}, label), select) };
}

function number(name, label) {
  const input = el("input", { name, type: "number", min: 1, max: 3600, step: 1, inputmode: "numeric" });
  const read = () => (input.validity.badInput ? NaN : input.value === "" ? null : Number(input.value));
  return { name, read, node: el("label", {}, el("span", {}, label), input) };
}

function boxes(name, label, options) {
  const inputs = options.map((option) => el("input", { type: "checkbox", name, value: option, checked: true }));
  return { name, read: () => inputs.filter((input) => input.checked).map((input) => input.value),
    node: el("fieldset", {}, el("legend", {}, label), ...inputs.map((input, at) =>
      el("label", { class: "box" }, input, el("span", {}, options[at])))) };
}
