// SPDX-License-Identifier: Apache-2.0
// Operations of the daemon: how far those that run are, and what came of the last.

import { outcome } from "./actions.js";
import { call, get, Problem } from "./api.js";
import { byId, el, setHidden, setText } from "./dom.js";
import { clock, duration, moment, plural } from "./format.js";

const SHOWN = 12;
const rows = new Map();
const running = new Set();

/** Ask and show. Answers whether one has ended that ran before. Raises Problem. */
export async function refresh() {
  const { operations } = await get(`v1/operations?limit=${SHOWN}`, { background: true });
  const list = byId("operations").querySelector("ul");
  const seen = new Set(operations.map(({ id }) => id));
  for (const [id, row] of rows) {
    if (!seen.has(id)) {
      row.root.remove();
      rows.delete(id);
    }
  }
  let before = null;
  for (const operation of operations) {
    if (!rows.has(operation.id)) rows.set(operation.id, made(operation));
    const { root, show } = rows.get(operation.id);
    const place = before ? before.nextSibling : list.firstChild;
    if (root !== place) list.insertBefore(root, place);
    before = root;
    show(operation);
  }
  const active = operations.filter(({ state }) => state === "running").map(({ id }) => id);
  setText(byId("operations-note"), active.length ? `${active.length} running` :
    operations.length ? "" : "none in the last hour");
  const ended = [...running].some((id) => !active.includes(id));
  running.clear();
  for (const id of active) running.add(id);
  return ended;
}

function made({ id, verb, started }) {
  const state = el("span", { class: "badge" });
  const bar = el("progress", { "aria-label": `${verb}: objects done` });
  const text = el("p", { class: "note" });
  const cancel = el("button", { type: "button", on: { click: () => stop(id, text) } }, "Cancel");
  const root = el("li", { data: { operation: id } },
    el("p", { class: "line-up" }, el("b", {}, verb), state, el("span", { class: "note", title: moment(started) },
      clock(started)), cancel), bar, text);
  return { root, show: (operation) => {
    const active = operation.state === "running";
    setText(state, operation.state);
    state.dataset.state = { running: "waiting", done: "good", failed: "bad", cancelled: "" }[operation.state];
    setHidden(cancel, !active);
    setHidden(bar, !active);
    if (active && operation.total) {
      bar.max = operation.total;
      bar.value = operation.objects + operation.skipped;
    }
    setText(text, active ? `${plural(operation.objects, "object")}${operation.total === null ? "" :
      ` of ${operation.total}`} in ${duration(operation.seconds)}` : outcome(operation));
  } };
}

async function stop(id, text) {
  try {
    await call("DELETE", `v1/operations/${id}`);
    await refresh();
  } catch (problem) {
    if (!(problem instanceof Problem)) throw problem;
    setText(text, `Not cancelled: ${problem.message}`);
  }
}
