// SPDX-License-Identifier: Apache-2.0
// The dependency tree, opened where somebody looks: base models and adapters, their namespaces, chains, chunks. Nothing
// is listed whole. A chain's chunks that follow one another stand below one another, not ever further to the right.

import { get, Problem } from "./api.js";
import { details } from "./details.js";
import { byId, el, setText } from "./dom.js";
import { bytes, clock, count, exact, exactBytes, plural, shortKey } from "./format.js";
import { nameOf, titleOf } from "./targets.js";

const PAGE = 50;
const MOST = 1000; // of one request
const RUN = 10; // chunks of a chain that one click shows

/** A page of what stands below a node. */
export function page(under, after, limit) {
  return get(`v1/tree?${new URLSearchParams({ under, after, limit })}`);
}

export class Tree {
  #open = new Set();
  #shown = new Map(); // rows of each list, so that a reload shows as many
  #selected = "";
  #source = null;
  #loads = 0;

  constructor(host) {
    this.host = host;
    this.whole();
  }

  /** Show everything, from the top. */
  whole() {
    this.#source = { id: "", load: (after, limit) => page("", after, limit), owner: undefined, at: 0 };
  }

  /** Show these nodes at the top. load(): the nodes, again at each reload. */
  found(load) {
    this.#source = { id: "found", load: async () => ({ nodes: await load(), next: null }), owner: undefined, at: 0 };
  }

  /** Have the details of this node shown, at the next reload. */
  select(id) {
    this.#selected = id;
  }

  /** Show everything that is open as it is now. Answers how many stand at the top. */
  async reload() {
    this.#loads += 1;
    const load = this.#loads;
    if (this.#shown.size > MOST) { // who looked at that much need not find it open again
      this.#shown.clear();
      this.#open.clear();
    }
    let list;
    try {
      list = await this.#list(this.#source);
    } catch (problem) {
      if (!(problem instanceof Problem)) throw problem;
      if (load === this.#loads) setText(byId("tree-note"), `Not known: ${problem.message}`);
      return 0;
    }
    if (load !== this.#loads) return 0; // a later one is under way
    const refocus = this.#focus();
    this.host.replaceChildren(list);
    refocus();
    setText(byId("tree-note"), `as of ${clock(Date.now() / 1000)}`);
    return list.children.length;
  }

  /** Puts the focus back, when called, onto the button that takes the place of the one that has it now. */
  #focus() {
    const active = document.activeElement;
    if (!this.host.contains(active)) return () => {};
    const id = active.closest("li")?.dataset.id ?? "";
    const group = active.closest(".actions")?.getAttribute("aria-label");
    const button = active.dataset.verb ? `[aria-label="${group}"] [data-verb="${active.dataset.verb}"]` :
      active.classList.contains("toggle") ? ".toggle" : ".name";
    return () => {
      const row = this.#row(id);
      const next = row?.querySelector(button) ?? row?.querySelector(".name") ?? byId("tree-title");
      next.focus({ preventScroll: true });
    };
  }

  #row(id) {
    return this.host.querySelector(`li[data-id="${CSS.escape(id)}"]`);
  }

  /** A list of what `source` has, with a button for more of it. */
  async #list(source) {
    const list = el("ul", { class: source.flat ? "flat" : null });
    const wanted = Math.min(MOST, Math.max(PAGE, this.#shown.get(source.id) ?? 0));
    await this.#add(list, source, "", wanted, 0);
    return list;
  }

  async #add(list, source, after, limit, before) {
    const { nodes, next } = await source.load(after, limit);
    const run = source.chain && !before && !next && nodes.length === 1 ? await this.#run(nodes[0]) : nodes;
    const rows = await Promise.all(run.map((node, place) => {
      const follows = run !== nodes && place + 1 < run.length;
      const at = node.kind !== "chunk" ? 0 : run === nodes ? source.at + 1 : source.at + 1 + place;
      return this.#node(node, { owner: source.owner ?? this.#ownerOf(node), at, follows });
    }));
    list.append(...rows);
    const shown = before + nodes.length;
    this.#shown.set(source.id, shown);
    if (!next) return;
    const more = el("li", { class: "more" }, el("button", { type: "button", on: { click: async ({ target }) => {
      target.disabled = true;
      await this.#guarded(more, () => this.#add(list, source, next, PAGE, shown));
      const first = more.nextSibling;
      more.remove();
      first?.querySelector(".name")?.focus();
    } } }, `${PAGE} more`), el("span", { class: "note" }, `${exact(shown)} shown`));
    list.append(more);
  }

  /** A chain from this chunk on, for as long as one follows one. */
  async #run(first) {
    const run = [first];
    while (run.length < RUN && run.at(-1).children === 1) {
      const { nodes, next } = await page(run.at(-1).id, "", 2);
      if (nodes.length !== 1 || next) break;
      run.push(nodes[0]);
    }
    return run;
  }

  #ownerOf(node) {
    return node.kind === "base" ? "" : node.kind === "adapter" ? node.digest : node.owner;
  }

  /** A row, with what is open below it. at: a chunk's place in its chain; follows: the next row continues it. */
  async #node(node, { owner, at, follows }) {
    const title = titleOf(node);
    const inside = el("div", { class: "inside" });
    const toggle = el("button", { type: "button", class: "toggle", "aria-expanded": "false",
      "aria-label": `What is below ${title}` });
    const name = el("button", { type: "button", class: "name", "aria-expanded": "false" }, ...this.#title(node, at));
    const row = el("li", { data: { id: node.id, kind: node.kind } }, el("div", { class: "row" },
      el("span", { class: "who" }, follows || !node.children ? el("span", { class: "toggle none" }) : toggle, name,
        ...chips(node)), ...cells(node)), inside);
    const source = { id: node.id, load: (after, limit) => page(node.id, after, limit), owner, at,
      chain: node.kind === "chunk", flat: node.kind === "chunk" && at > 1 && node.children === 1 };
    toggle.addEventListener("click", () => (this.#open.delete(node.id) ? this.#close(toggle, inside, source) :
      this.#guarded(inside, () => this.#expand(toggle, inside, source))));
    name.addEventListener("click", () => this.#detail(row, node, owner));
    if (this.#selected === node.id) this.#showDetails(row, node, owner);
    if (this.#open.has(node.id) && node.children && !follows) {
      await this.#guarded(inside, () => this.#expand(toggle, inside, source));
    }
    return row;
  }

  #title(node, at) {
    if (node.kind === "chunk") return [at ? `chunk ${at} ` : "chunk ", el("code", {}, shortKey(node.key))];
    const dim = (text) => el("span", { class: "note" }, text);
    if (node.kind === "space" && node.model) {
      const tenant = node.salt ? `, tenant ${node.salt.slice(0, 8)}` : "";
      return [titleOf(node), dim(` ${node.kv_dtype}, ${node.chunk_tokens} tokens a chunk${tenant}`)];
    }
    if (node.kind === "adapter") {
      const where = node.tiers.length ? ` ${bytes(node.size)} in ${node.tiers.join(", ")}` : " not held here";
      return [titleOf(node), dim(`${nameOf(node) ? ` ${shortKey(node.digest)}` : ""}${where}`)];
    }
    return [titleOf(node)];
  }

  async #expand(toggle, inside, source) {
    this.#open.add(source.id);
    toggle.setAttribute("aria-expanded", "true");
    const list = await this.#list(source);
    if (!list.children.length) list.append(el("li", { class: "empty note" }, "nothing below it now"));
    inside.replaceChildren(list);
  }

  #close(toggle, inside, source) {
    this.#shown.delete(source.id);
    toggle.setAttribute("aria-expanded", "false");
    inside.replaceChildren();
  }

  async #guarded(inside, work) {
    try {
      await work();
    } catch (problem) {
      if (!(problem instanceof Problem)) throw problem;
      inside.replaceChildren(el("p", { class: "note wrong" }, problem.message));
    }
  }

  #detail(row, node, owner) {
    const again = this.#selected === node.id;
    this.host.querySelector(".details")?.remove();
    this.host.querySelector('.name[aria-expanded="true"]')?.setAttribute("aria-expanded", "false");
    this.#selected = "";
    if (!again) this.#showDetails(row, node, owner);
  }

  #showDetails(row, node, owner) {
    this.#selected = node.id;
    row.querySelector(".name").setAttribute("aria-expanded", "true");
    row.querySelector(".row").after(details(node, owner, () => this.reload()));
  }
}

function chips(node) {
  const chip = (text, look, title) => el("span", { class: `chip ${look}`, title }, text);
  const engines = `in the memory of ${plural(node.engines ?? 0, "engine")}`;
  return [
    ...(node.engines ? [chip(`gpu ×${node.engines}`, "gpu", engines)] : []),
    ...(node.pinned ?? []).map((tier) => chip(`pinned ${tier}`, "pinned", "stays until it is unpinned")),
    ...(node.leases ? [chip(`leased ${node.leases}`, "leased", "read or written just now")] : []),
  ];
}

function cells(node) {
  const cell = (label, field, text, title) => el("span", { class: "cell", title, data: { label, field } }, text);
  if (node.kind === "space" && !node.model) return [];
  const held = ["cpu", "disk"].map((tier) => {
    if (node.kind === "chunk") {
      const size = node.tiers.includes(tier) ? node.size : 0;
      return cell(tier, tier, size ? bytes(size) : "–", exactBytes(size));
    }
    const [objects, size] = [node.objects[tier] ?? 0, node.bytes[tier] ?? 0];
    return cell(tier, tier, objects ? `${count(objects)} · ${bytes(size)}` : "–",
      `${plural(objects, "object")}, ${exactBytes(size)}`);
  });
  return [...held, cell("hits", "hits", count(node.hits), exact(node.hits))];
}
