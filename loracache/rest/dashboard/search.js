// SPDX-License-Identifier: Apache-2.0
// Finds adapters by name, objects by key, models by name, and shows them where the tree is.

import { get, post, Problem } from "./api.js";
import { buttons } from "./details.js";
import { byId, el, setHidden, setText } from "./dom.js";
import { isKey, plural } from "./format.js";
import { modelTarget, amount } from "./targets.js";
import { page } from "./tree.js";

const MOST_ADAPTERS = 50;
const MOST_PAGES = 5;
const PAGE = 1000;
const NAME = /^[A-Za-z0-9][\w.:@+/-]{0,198}$/; // what an adapter can be called

export function setUp(tree) {
  let latest = 0;
  byId("search").addEventListener("submit", async (event) => {
    event.preventDefault();
    const text = byId("query").value.trim();
    latest += 1;
    const mine = latest;
    const note = byId("search-note");
    if (!text) return clear(tree);
    note.replaceChildren("Looking …");
    let first;
    try {
      first = await find(text);
    } catch (problem) {
      if (!(problem instanceof Problem)) throw problem;
      setText(note, `Not known: ${problem.message}`);
      return;
    }
    if (mine !== latest) return;
    const again = () => byId("search").requestSubmit();
    setHidden(byId("search-clear"), false);
    note.replaceChildren(...said(text, first, again));
    let known = first.nodes;
    tree.found(async () => {
      const nodes = known ?? (await find(text)).nodes;
      known = null;
      return nodes;
    });
    tree.select(first.nodes[0]?.id ?? "");
    await tree.reload();
  });
  byId("search-clear").addEventListener("click", () => clear(tree));
}

/** Look for this. */
export function searchFor(text) {
  byId("query").value = text;
  byId("search").requestSubmit();
  byId("tree-title").scrollIntoView({ block: "start" });
  byId("tree-title").focus({ preventScroll: true });
}

function clear(tree) {
  byId("query").value = "";
  byId("search-note").replaceChildren();
  setHidden(byId("search-clear"), true);
  tree.select("");
  tree.whole();
  byId("query").focus();
  return tree.reload();
}

function said(text, { nodes, model }, again) {
  const parts = [nodes.length ? `${plural(nodes.length, "match")} `.replace("matchs", "matches") : ""];
  if (model) {
    const kept = Object.entries(model).map(([tier, held]) => `${tier}: ${amount(held)}`).join("; ");
    parts.push(el("span", { id: "model-held" }, `Model ${text}, KV of its adapters too: ${kept}. `),
      buttons("The whole model", modelTarget(text), again));
  }
  return nodes.length || model ? parts : [`Nothing here is called ${text} or has it for a key.`];
}

async function find(text) {
  if (isKey(text)) return { nodes: await byKey(text), model: null };
  const [adapters, spaces, model] = await Promise.all([byName(text), baseSpaces(text), modelHeld(text)]);
  return { nodes: [...adapters, ...spaces], model };
}

/** An object, and behind it the namespace it stands in; or an adapter. */
async function byKey(key) {
  const { objects: [found] } = await get(`v1/objects?${new URLSearchParams({ key })}`);
  if (found && found.kind !== "lora") {
    const space = { id: `space:${found.namespace}`, kind: "space", model: "", names: [], children: 1 };
    return [{ ...found, id: key, kind: "chunk" }, space];
  }
  const adapter = await adapterNode(key);
  return adapter ? [adapter] : [];
}

/** An adapter's node as the tree has it: the first behind the digest before it. */
async function adapterNode(digest) {
  const before = BigInt(`0x${digest}`) - 1n;
  if (before < 0n) return null;
  const { nodes } = await page("", `adapter:${before.toString(16).padStart(64, "0")}`, 1);
  return nodes[0]?.digest === digest ? nodes[0] : null;
}

/** Adapters whose name is `text`, or begins with it. They stand in the order of names behind everything that begins
 *  with the character before text's last one; no name has a "~", which comes behind all that names have. */
async function byName(text) {
  if (!NAME.test(text)) return [];
  const after = `${text.slice(0, -1)}${String.fromCharCode(text.charCodeAt(text.length - 1) - 1)}~`;
  const list = await known(get(`v1/adapters?${new URLSearchParams({ after, limit: MOST_ADAPTERS })}`));
  const found = list?.adapters.filter(({ name }) => name.startsWith(text)) ?? []; // a tenant's token lists none
  const digests = [...new Set(found.map(({ digest }) => digest))];
  const nodes = await Promise.all(digests.map(adapterNode));
  return nodes.map((node, at) => node ?? fromAdapter(found.find(({ digest }) => digest === digests[at])));
}

/** A node of an adapter that this daemon knows by name alone. */
function fromAdapter(adapter) {
  const part = (what) => Object.fromEntries(Object.entries(adapter.kv).map(([tier, held]) => [tier, held[what]]));
  return { id: `adapter:${adapter.digest}`, kind: "adapter", digest: adapter.digest, names: [adapter.name],
    engines: adapter.engines, size: adapter.size, tiers: adapter.tiers.filter((tier) => tier !== "gpu"), pinned: [],
    children: 0, hits: 0, objects: part("objects"), bytes: part("bytes") };
}

/** Namespaces of base models whose name has `text` in it, or whose identity begins with it. */
async function baseSpaces(text) {
  const wanted = text.toLowerCase();
  const found = [];
  let after = "";
  for (let pages = 0; pages < MOST_PAGES; pages += 1) {
    const { nodes, next } = await page("base", after, PAGE);
    found.push(...nodes.filter(({ names, model }) => model.startsWith(text) ||
      names.some((name) => name.toLowerCase().includes(wanted))));
    if (!next) break;
    after = next;
  }
  return found.slice(0, MOST_ADAPTERS).map((node) => ({ ...node, owner: "" }));
}

async function modelHeld(text) {
  return (await known(post("v1/lookup", { selector: { model: text } })))?.held ?? null;
}

/** null where there is no such thing, or none for this token. */
async function known(answer) {
  try {
    return await answer;
  } catch (problem) {
    if (problem instanceof Problem && [403, 404, 409, 422].includes(problem.status)) return null;
    throw problem;
  }
}
