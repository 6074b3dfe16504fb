// SPDX-License-Identifier: Apache-2.0
// Calls of the control API, with the token where there is one, and what goes wrong as a Problem in words.

const TOKEN = "loracache.token";
const PATIENCE_MS = 30_000;

/** status: of HTTP; 0 where nobody answered. */
export class Problem extends Error {
  constructor(status, detail, retryAfter = 0) {
    super(detail);
    this.status = status;
    this.retryAfter = retryAfter;
  }

  /** Whether nobody is there, or the one who is there has no daemon behind it. */
  get gone() {
    return this.status === 0 || this.status === 502 || this.status === 503 || this.status === 504;
  }
}

export const token = {
  get: () => sessionStorage.getItem(TOKEN) ?? "",
  set: (value) => sessionStorage.setItem(TOKEN, value),
  forget: () => sessionStorage.removeItem(TOKEN),
};

const asking = { why: null };

/** Who asks for a token when a call that somebody waits for needs one: why(detail) resolves to whether there is one. */
export function whenRefused(why) {
  asking.why = why;
}

export const get = (path, options) => call("GET", path, options);
export const post = (path, body, options) => call("POST", path, { ...options, body });

/** The answer's body. background: fail at a 401 rather than ask for a token. as: a token to try, not kept. */
export async function call(method, path, { body, signal, background = false, as } = {}) {
  for (;;) {
    try {
      return await once(method, path, body, signal, as ?? token.get());
    } catch (problem) {
      const ask = problem.status === 401 && !background && as === undefined && asking.why !== null;
      if (!ask || !(await asking.why(problem.message))) throw problem;
    }
  }
}

async function once(method, path, body, signal, bearer) {
  const headers = bearer ? { authorization: `Bearer ${bearer}` } : {};
  if (body !== undefined) headers["content-type"] = "application/json";
  const patience = AbortSignal.timeout(PATIENCE_MS);
  const answer = await reach(path, {
    method, headers, cache: "no-store", credentials: "omit",
    body: body === undefined ? undefined : JSON.stringify(body),
    signal: signal ? AbortSignal.any([signal, patience]) : patience,
  });
  try {
    return await answer.json();
  } catch {
    throw new Problem(0, "the answer broke off");
  }
}

/** A Response with a good status; used as it is for what has no end. */
export async function reach(path, options) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (options.signal?.aborted && options.signal.reason?.name !== "TimeoutError") throw error;
    throw new Problem(0, "no answer from the daemon");
  }
  if (answer.ok) return answer;
  let detail = answer.statusText || `status ${answer.status}`;
  try {
    detail = (await answer.json()).detail ?? detail;
  } catch {
    // What is not a problem document says no more than its status.
  }
  throw new Problem(answer.status, detail, Number(answer.headers.get("retry-after")) || 0);
}
