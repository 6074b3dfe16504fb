// SPDX-License-Identifier: Apache-2.0
// The page: asks for statistics every two seconds, and says whether anybody answers.

import * as actions from "./actions.js";
import { get, Problem, token } from "./api.js";
import { byId, setHidden, setText } from "./dom.js";
import { Feed } from "./feed.js";
import { clock } from "./format.js";
import * as operations from "./operations.js";
import * as overview from "./overview.js";
import * as quotas from "./quotas.js";
import * as search from "./search.js";
import * as signin from "./signin.js";
import { Tree } from "./tree.js";

const POLL_MS = 2000;

const tree = new Tree(byId("tree"));
const feed = new Feed(search.searchFor);
let state = "waiting";
let since = 0; // when nobody answered first, Unix seconds
let asked = null; // the token that was refused last: for each, somebody is asked once
let timer = 0;
let polls = 0;

function become(next, text, banner = "") {
  state = next;
  byId("state").dataset.state = next;
  setText(byId("state"), text);
  setText(byId("banner"), banner);
  setHidden(byId("banner"), !banner);
  byId("main").classList.toggle("stale", next === "gone");
}

async function poll() {
  clearTimeout(timer);
  polls += 1;
  const mine = polls;
  let wait = POLL_MS;
  try {
    const ended = await refresh();
    if (mine !== polls) return;
    if (state === "gone" || ended) tree.reload();
    since = 0;
    if (state !== "good") become("good", "connected");
  } catch (problem) {
    if (mine !== polls) return;
    if (!(problem instanceof Problem)) throw problem;
    wait = Math.max(wait, problem.retryAfter * 1000);
    refused(problem);
  } finally {
    if (mine === polls) timer = setTimeout(poll, wait);
  }
}

async function refresh() {
  const [stats, ended] = await Promise.allSettled([get("v1/stats", { background: true }), operations.refresh()]);
  if (stats.status === "rejected") throw stats.reason;
  overview.show(stats.value, performance.now());
  quotas.show(stats.value.quotas);
  if (ended.status === "rejected") throw ended.reason;
  return ended.value;
}

function refused(problem) {
  if (problem.gone) {
    since ||= Date.now() / 1000;
    become("gone", "daemon gone, retrying",
      `No answer since ${clock(since)}: ${problem.message}. What is shown is what was known then. Asking again.`);
    return;
  }
  if (problem.status === 401) {
    become("locked", "needs a token", `Sign in to see this: ${problem.message}`);
    if (asked !== token.get()) {
      asked = token.get();
      signin.ask(problem.message).then((given) => given && restart());
    }
    return;
  }
  become("limited", problem.status === 429 ? "slowed down" : "connected",
    problem.status === 403 ? `Not shown to this token: ${problem.message}` : problem.message);
}

function restart() {
  asked = null;
  poll();
  tree.reload();
  feed.restart();
}

signin.setUp(restart);
actions.setUp();
overview.setUp();
quotas.setUp(poll);
search.setUp(tree);
byId("tree-reload").addEventListener("click", () => tree.reload());
document.addEventListener("visibilitychange", () => document.hidden || poll());
restart();
