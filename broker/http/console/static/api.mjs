// Calls the public HTTP API with the user's key. The key is kept for this browser tab only. The console uses no
// call that another client could not use.

import { App } from "/sdk/app.mjs";
import { batch, signal } from "./html.mjs";
import { skew } from "./format.mjs";

const KEPT = "ordain.key";
const TIMEOUT_MS = 20_000;

export const apiKey = signal(sessionStorage.getItem(KEPT) ?? "");
/** The last answer of /v1/system: the state of the broker and the scopes of our key. */
export const system = signal(null);
/** Whether the broker answers. `since`: when that last changed; `error`: the message of the last failure. */
export const link = signal({ up: true, since: null, error: null });
/** Why the console signed the user out; null if the user did it. */
export const signedOut = signal(null);

/** The broker refused a request, or did not answer (`status` 0). */
export class Refused extends Error {
  constructor(status, code, message, details = null) {
    super(message);
    this.name = "Refused";
    Object.assign(this, { status, code, details });
  }
}

export function signIn(key) {
  sessionStorage.setItem(KEPT, key);
  batch(() => {
    signedOut.value = null;
    apiKey.value = key;
  });
}

export function signOut(why = null) {
  sessionStorage.removeItem(KEPT);
  batch(() => {
    signedOut.value = why;
    system.value = null;
    apiKey.value = "";
  });
}

export function may(scope) {
  const scopes = system.value?.caller?.scopes ?? [];
  return scopes.includes(scope) || scopes.includes("admin");
}

function heard(up, error = null) {
  const { up: before } = link.peek();
  if (up !== before) link.value = { up, since: Date.now(), error };
  else if (!up) link.value = { ...link.peek(), error };
}
export { heard };

/** Makes one request. Raises Refused. A 401 signs the user out. */
export async function call(method, path, { query = {}, body, signal: stop, key = apiKey.peek() } = {}) {
  const given = Object.entries(query).filter(([, value]) => value !== null && value !== undefined && value !== "");
  const search = new URLSearchParams(given).toString();
  const late = AbortSignal.timeout(TIMEOUT_MS);
  let answer, text;
  try {
    answer = await fetch(`${path}${search && `?${search}`}`, {
      method,
      headers: { Authorization: `Bearer ${key}`, ...(body === undefined ? {} : { "Content-Type": "application/json" }) },
      body: body === undefined ? undefined : JSON.stringify(body),
      cache: "no-store",
      credentials: "omit",
      signal: stop ? AbortSignal.any([stop, late]) : late,
    });
    text = await answer.text();
  } catch (broken) {
    if (stop?.aborted) throw broken;
    const said = late.aborted ? `no answer within ${TIMEOUT_MS / 1_000} s` : "the broker does not answer";
    heard(false, said);
    throw new Refused(0, "unreachable", said);
  }
  heard(true);
  let said = null;
  try {
    said = text ? JSON.parse(text) : null;
  } catch {
    throw new Refused(answer.status, "unexpected", `answered ${answer.status}, and not in JSON`);
  }
  if (answer.ok) return said;
  const { code = `http_${answer.status}`, message = `answered ${answer.status}`, details } = said?.error ?? {};
  if (answer.status === 401 && key === apiKey.peek() && key) signOut("This key is no longer valid.");
  throw new Refused(answer.status, code, message, details);
}

export const get = (path, query, stop) => call("GET", path, { query, signal: stop });
export const post = (path, body = {}) => call("POST", path, { body });

/** Reads /v1/system, and measures how far the broker's clock differs from ours. Raises Refused. */
export async function readSystem(key = apiKey.peek()) {
  const asked = Date.now();
  const found = await call("GET", "/v1/system", { key });
  skew.value = Date.parse(found.clock.now) - (asked + Date.now()) / 2;
  if (key === apiKey.peek()) system.value = found;
  return found;
}

/** The JavaScript SDK, used for the stream of events. */
export const sdk = () => new App(location.origin, apiKey.peek(), { backoffSec: 0.25, backoffCapSec: 5 });

/** Reads the pages of a list until about `most` entries. `more`: there are others. */
export async function all(path, query, most, stop) {
  const found = [];
  let cursor = null;
  do {
    const page = await get(path, { ...query, cursor }, stop);
    found.push(...page.data);
    cursor = page.next_cursor;
  } while (cursor !== null && found.length < most);
  return { data: found, more: cursor !== null };
}

export const encoded = encodeURIComponent;
