// SPDX-License-Identifier: Apache-2.0
// The token: asked for in a dialog, tried before it is kept, kept in this tab only.

import { call, Problem, token, whenRefused } from "./api.js";
import { byId, setHidden, setText } from "./dom.js";

const PRINTABLE = /^[\x21-\x7e]+$/;
let pending = null; // of the dialog that is open: everybody who asks waits for the same answer
let resolve = null;
let opener = null;

/** changed(): called when somebody signed in or out. */
export function setUp(changed) {
  whenRefused(ask);
  byId("sign-in").addEventListener("click", async () => {
    if (await ask("Reading may need none; whatever changes something does.")) changed();
  });
  byId("sign-out").addEventListener("click", () => {
    token.forget();
    show();
    byId("sign-in").focus();
    changed();
  });
  byId("token-form").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  byId("token-cancel").addEventListener("click", () => byId("token-dialog").close());
  byId("token-dialog").addEventListener("close", () => closed(false));
  show();
}

/** Resolves to whether there is a token now. */
export function ask(why) {
  if (pending) return pending;
  opener = document.activeElement;
  pending = new Promise((done) => {
    resolve = done;
  });
  setText(byId("token-why"), why);
  setText(byId("token-error"), "");
  byId("token").value = "";
  byId("token-dialog").showModal();
  byId("token").focus();
  return pending;
}

async function submit() {
  const given = byId("token").value.trim();
  setText(byId("token-error"), "");
  if (!PRINTABLE.test(given)) {
    setText(byId("token-error"), "A token has letters, digits, dashes and underscores only.");
    return;
  }
  try {
    await call("GET", "v1/operations?limit=1", { as: given });
  } catch (problem) {
    // A token that may not do this is one all the same.
    if (!(problem instanceof Problem) || problem.status !== 403) {
      const text = problem.status === 401 ? "This daemon does not know this token." : problem.message;
      setText(byId("token-error"), text);
      return;
    }
  }
  token.set(given);
  show();
  const answer = resolve;
  resolve = null;
  byId("token-dialog").close();
  closed(true, answer);
}

function closed(given, answer = resolve) {
  byId("token").value = "";
  if (given || resolve) opener?.focus?.();
  pending = null;
  resolve = null;
  answer?.(given);
}

function show() {
  const known = token.get() !== "";
  setHidden(byId("sign-in"), known);
  setHidden(byId("sign-out"), !known);
}
