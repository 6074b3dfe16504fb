// SPDX-License-Identifier: Apache-2.0
// Elements. Text goes in as text: nothing here can turn what a user named into markup.

/** An element. props: class, title, data (an object), on (event -> handler); everything else is an attribute. */
export function el(tag, props = {}, ...children) {
  return fill(document.createElement(tag), props, children);
}

/** The same for SVG. */
export function svg(tag, props = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), props, children);
}

function fill(node, props, children) {
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "data") Object.assign(node.dataset, value);
    else if (name === "on") for (const [event, handler] of Object.entries(value)) node.addEventListener(event, handler);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export const byId = (id) => document.getElementById(id);

/** Change text and title only where they differ: a screen reader is told of changes alone. */
export function setText(node, text, title) {
  if (node.textContent !== text) node.textContent = text;
  if (title !== undefined && node.title !== title) node.title = title;
}

export function setHidden(node, hidden) {
  if (node.hidden !== hidden) node.hidden = hidden;
}

const said = new WeakMap();

/** Rows of a small table, written again only where what they say has changed. columns: {label, number, head};
 *  rows: arrays of [text, title]; empty: what stands there where there are none. */
export function setRows(body, columns, rows, empty) {
  const now = JSON.stringify(rows);
  if (said.get(body) === now) return;
  said.set(body, now);
  if (!rows.length) {
    body.replaceChildren(el("tr", { class: "empty" }, el("td", { colspan: columns.length }, empty)));
    return;
  }
  body.replaceChildren(...rows.map((cells) => el("tr", {}, ...cells.map((cell, at) => tableCell(cell, columns[at])))));
}

function tableCell([text, title], { label, number, head }) {
  return el(head ? "th" : "td", { class: number ? "number" : null, title, scope: head ? "row" : null,
    data: { label } }, text);
}
