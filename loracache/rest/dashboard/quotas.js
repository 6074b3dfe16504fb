// SPDX-License-Identifier: Apache-2.0
// Quotas: what each owner may have of a tier and what it uses; a form gives one, a button ends one.

import { call, Problem } from "./api.js";
import { byId, el, setHidden, setText } from "./dom.js";
import { bytes, count, exact, exactBytes, shortKey } from "./format.js";

let said = "";

export function setUp(changed) {
  byId("quota-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const { kind, name, tier, soft, hard } = Object.fromEntries(new FormData(event.target));
    const body = { kind, name: name.trim(), tier, soft: soft.trim() || "0" };
    if (hard.trim()) body.hard = hard.trim();
    send("PUT", "v1/quotas", { body }, `given to ${kind} ${shortKey(body.name)} in ${tier}`, changed);
  });
  byId("quotas").querySelector("tbody").addEventListener("click", ({ target }) => {
    const button = target.closest("button");
    if (!button) return;
    const { kind, name, tier } = button.dataset;
    const query = new URLSearchParams({ kind, name, tier });
    send("DELETE", `v1/quotas?${query}`, {}, `ended for ${kind} ${shortKey(name)} in ${tier}`, changed);
  });
}

/** Show what the statistics say of quotas. */
export function show(quotas) {
  const now = JSON.stringify(quotas);
  if (said === now) return;
  said = now;
  setText(byId("quotas-note"), quotas.length ? "" : "none: every tier is everybody's");
  setHidden(byId("quotas").querySelector("table"), !quotas.length);
  byId("quotas").querySelector("tbody").replaceChildren(...quotas.map(row));
}

function row({ kind, name, tier, soft, hard, bytes: used, refused, evicted }) {
  const number = (label, text, title) => el("td", { class: "number", title, data: { label } }, text);
  const all = name === "*"; // a default: nobody's own
  return el("tr", { data: { quota: `${kind} ${name} ${tier}` } },
    el("td", { data: { label: "of" }, title: name }, all ? `every other ${kind}` : `${kind} ${shortKey(name)}`),
    el("td", { data: { label: "tier" } }, tier),
    number("share", bytes(soft), exactBytes(soft)),
    number("limit", hard === null ? "none" : bytes(hard), hard === null ? "" : exactBytes(hard)),
    number("used", all ? "–" : bytes(used), all ? "" : exactBytes(used)),
    number("refused", all ? "–" : count(refused), exact(refused)),
    number("evicted", all ? "–" : count(evicted), exact(evicted)),
    el("td", {}, el("button", { type: "button", data: { kind, name, tier },
      "aria-label": `End the quota of ${kind} ${name} in ${tier}` }, "End")));
}

async function send(method, path, options, done, changed) {
  const result = byId("quota-result");
  try {
    await call(method, path, options);
  } catch (problem) {
    if (!(problem instanceof Problem)) throw problem;
    result.dataset.state = "bad";
    setText(result, `Not done: ${problem.message}`);
    return;
  }
  result.dataset.state = "good";
  setText(result, `Quota ${done}.`);
  changed();
}
