// SPDX-License-Identifier: Apache-2.0
// What a button works on: how the API names it, what it is called, and how much of it there is.

import { post } from "./api.js";
import { bytes, plural, shortKey } from "./format.js";

/** title: what dialogs call it. selector: for the API. own: tier -> {objects, bytes} where that is known; else the
 *  daemon is asked. below: a selector of what an eviction takes along, and whatBelow in words. */
function target(title, selector, { own = null, below = null, whatBelow = "", caution = "" } = {}) {
  return { title, selector, own, below, whatBelow, caution };
}

export const nameOf = (node) => node.names?.length ? node.names.join(", ") : "";

export function titleOf(node) {
  if (node.kind === "base") return "Base models";
  if (node.kind === "adapter") return nameOf(node) || `adapter ${shortKey(node.digest)}`;
  if (node.kind === "space") return nameOf(node) || (node.model ? `model ${shortKey(node.model)}` : "namespace");
  return `chunk ${shortKey(node.key)}`;
}

const each = (node) => Object.fromEntries(node.tiers.map((tier) => [tier, { objects: 1, bytes: node.size }]));

/** Groups of buttons for a node of the tree: [label, target]. owner: the digest of the adapter that it belongs to, ""
 *  for a base model, undefined where that is not known. */
export function targetsOf(node, owner) {
  if (node.kind === "base") {
    return [["All KV of base models", target("all KV of base models", { model: "*", adapter: "" })]];
  }
  if (node.kind === "adapter") {
    const kv = { adapter: node.digest, model: "*" };
    const name = titleOf(node);
    return [
      ["The adapter", target(`adapter ${name}`, { adapter: node.digest }, { own: each(node), below: kv,
        whatBelow: "its KV" })],
      ["Its KV", target(`the KV of adapter ${name}`, kv)],
    ];
  }
  if (node.kind === "chunk") {
    return [["This chunk", target(`chunk ${shortKey(node.key)}`, { keys: [node.key] }, { own: each(node),
      whatBelow: node.children ? "every chunk that continues it" : "" })]];
  }
  if (owner === undefined || !node.model) return [];
  const caution = "The API names KV by model and adapter: all of that pair is meant, of every tenant and format.";
  return [["All KV of this model and adapter", target(`the KV of ${titleOf(node)}`,
    { model: node.model, adapter: owner }, { caution })]];
}

/** All KV of a model, whatever adapter it is of. */
export function modelTarget(name) {
  return target(`all KV of model ${name}, of its adapters too`, { model: name });
}

/** tier -> {objects, bytes} of a selector of namespaces. */
export async function held(selector) {
  return (await post("v1/lookup", { selector })).held;
}

export const NOTHING = { objects: 0, bytes: 0 };

export const amount = (kept) => `${plural(kept.objects, "object")}, ${bytes(kept.bytes)}`;
