// SPDX-License-Identifier: Apache-2.0
// What there is to say of a node of the tree, and the buttons that change it.

import { openAction } from "./actions.js";
import { el } from "./dom.js";
import { bytes, exact, exactBytes } from "./format.js";
import { amount, targetsOf } from "./targets.js";

const VERBS = [["pin", "Pin"], ["unpin", "Unpin"], ["evict", "Evict"], ["move", "Move or copy"]];
const LONG = 40; // characters: a digest

/** owner: see targetsOf. done(): called when something was changed. */
export function details(node, owner, done) {
  const groups = targetsOf(node, owner);
  return el("div", { class: "details" }, el("dl", {}, ...facts(node).map(([name, text, title]) => {
    const value = el("dd", { title, data: { fact: name } }, text);
    return el("div", { class: text.length >= LONG ? "long" : null }, el("dt", {}, name), value);
  })),
  ...groups.map(([label, target]) => buttons(label, target, done)));
}

/** A row of buttons that ask first. */
export function buttons(label, target, done) {
  return el("div", { class: "actions", role: "group", "aria-label": label }, el("span", { class: "note" }, label),
    ...VERBS.map(([verb, text]) => el("button", { type: "button", data: { verb }, on: { click: async () => {
      if (await openAction(verb, target)) done();
    } } }, text)));
}

function facts(node) {
  const kept = node.objects ? Object.entries(node.objects).map(([tier, objects]) =>
    [`KV in ${tier}`, amount({ objects, bytes: node.bytes[tier] }), exactBytes(node.bytes[tier])]) : [];
  const where = ["held in", node.tiers?.join(", ") || "no tier of this daemon"];
  const pinned = ["pinned in", node.pinned?.join(", ") || "no tier"];
  if (node.kind === "adapter") {
    return [["digest", node.digest], ["size", bytes(node.size), exactBytes(node.size)], where, pinned,
      ["engines that hold it", exact(node.engines)], ...kept];
  }
  if (node.kind === "chunk") {
    return [["key", node.key], ["size", bytes(node.size), exactBytes(node.size)],
      ...(node.stored === node.size ? [] : [["stored as", bytes(node.stored), exactBytes(node.stored)]]), where, pinned,
      ["leases", exact(node.leases)], ["hits", exact(node.hits)], ["chunks behind it", exact(node.children)],
      ["namespace", node.namespace], ["continues", node.parent || "nothing"]];
  }
  if (node.kind === "space" && node.model) {
    return [["model", node.model], ["dtype", node.kv_dtype], ["tokens of a chunk", exact(node.chunk_tokens)],
      ...(node.salt ? [["tenant", node.salt]] : []), ["chains", exact(node.children)], ...kept];
  }
  return node.kind === "space" ? [["namespace", node.id.slice("space:".length)]] : kept;
}
