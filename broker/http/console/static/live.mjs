// The rows of commands, and the one event stream that keeps them up to date. An event changes the row at once;
// the changed rows are drawn with the next animation frame.

import { get, heard, link, may, readSystem, sdk } from "./api.mjs";
import { signal } from "./html.mjs";

export const CLOSED = new Set(["executed", "failed", "timed_out", "expired", "cancelled"]);
const POLL_MS = 2_000;
const MOST_REMEMBERED = 5_000;

/** Changes with each drawing. A component that shows rows reads it, so that it is drawn again. */
export const painted = signal(0);
/** `live`, `polling` (the key may not follow events), `broken`, `off`. */
export const stream = signal("off");
/** The position of the last event from the stream. */
export const reached = signal(0);
export const stats = signal(null);

let asked = false;
/** Requests one drawing with the next animation frame. */
export function paint() {
  if (asked || document.hidden) return;
  asked = true;
  requestAnimationFrame(() => {
    asked = false;
    painted.value += 1;
  });
}
document.addEventListener("visibilitychange", paint);

const TIMEOUTS = {
  no_answer: "no answer in time",
  no_result: "the device acknowledged it, but sent no result",
  ttl: "its time ran out",
  unsendable: "cannot be sent again",
  device_deleted: "its device was deleted",
  operator: "an operator gave up",
};
const ms = (text) => (text ? Date.parse(text) : null);

/** The row for a command of the API. */
export function rowOf(command) {
  return {
    id: command.id,
    device: command.device_id,
    hardware: command.hardware_id,
    type: command.type,
    state: command.state,
    created: Date.parse(command.created_at),
    expires: ms(command.expires_at),
    attempts: command.attempts,
    note: noteOf(command),
    v: 0,
  };
}

function noteOf({ state, error }) {
  if (state === "timed_out") return TIMEOUTS[error?.details?.reason] ?? "no answer";
  return error ? error.message || error.code : "";
}

/** Applies an event to a row. */
export function fold(row, { name, data }) {
  row.v += 1;
  if (name === "published") Object.assign(row, { state: "published", attempts: data.attempt });
  else if (name === "acknowledged") row.state = "acknowledged";
  else if (name === "progressed") {
    const percent = data.percent === undefined ? [] : [`${data.percent} %`];
    Object.assign(row, { state: "acknowledged", note: [...percent, ...(data.note ? [data.note] : [])].join(" ") });
  } else if (name === "failed") Object.assign(row, { state: name, note: data.error?.message || data.error?.code || "" });
  else if (name === "timed_out") Object.assign(row, { state: name, note: TIMEOUTS[data.reason] ?? data.reason });
  else if (name === "executed") Object.assign(row, { state: name, note: "" });
  else if (CLOSED.has(name)) Object.assign(row, { state: name, note: data.reason ?? "" });
}

const born = ({ subject, time, data }) => ({
  id: subject,
  device: data.device_id,
  hardware: data.hardware_id,
  type: data.type,
  state: "pending",
  created: Date.parse(time),
  expires: ms(data.expires_at),
  attempts: 0,
  note: "",
  v: 0,
});

/** Rows of the newest commands that were created since the page was opened, whether a list shows them or not. */
const remembered = new Map();
const listeners = new Set();

/** Calls `listener(event, row)` for every event; `row` may be null (unknown). Returns a function that ends this. */
export function follow(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

function take(event) {
  const [, kind, name] = event.type.split(".");
  const seen = { ...event, kind, name, position: Number(event.id) };
  let row = null;
  if (kind === "command") {
    if (name === "created") {
      row = born(event);
      remembered.set(row.id, row);
      if (remembered.size > MOST_REMEMBERED) remembered.delete(remembered.keys().next().value);
    } else row = remembered.get(event.subject) ?? null;
  }
  if (row) foldOnce(row, seen);
  for (const listener of listeners) listener(seen, row);
  reached.value = seen.position;
  paint();
}

/** Applies an event to a row once, even if several lists hold the row. */
export function foldOnce(row, event) {
  if (row.folded >= event.position) return;
  row.folded = event.position;
  fold(row, event);
}

/** Follows events after a position until stopped. Without the scope events:read, the lists poll instead. */
async function followEvents(after, stop) {
  if (!may("events:read")) {
    stream.value = "polling";
    return;
  }
  const onConnection = (up, error) => {
    stream.value = up ? "live" : "broken";
    if (!up) heard(false, error?.message ?? "the stream of events broke");
  };
  while (!stop.aborted) {
    try {
      for await (const event of sdk().command.events({ after, signal: stop, onConnection })) {
        take(event);
        after = reached.peek();
      }
    } catch (error) {
      if (stop.aborted) return;
      stream.value = "broken";
      if (error.status === 401) return;
      if (error.status === 410) location.reload(); // the position belongs to another log: start again
      await new Promise((done) => setTimeout(done, POLL_MS));
    }
  }
}

const polls = new Set();
/** Calls `poll` every two seconds while the page shows the present. Returns a function that ends this. */
export function polled(poll) {
  polls.add(poll);
  return () => polls.delete(poll);
}

export async function readStats() {
  stats.value = await get("/v1/stats", { window: 300 });
}

/** Starts live updates: figures every two seconds, and events as they come. Returns a function that stops them. */
export function start(position) {
  const stop = new AbortController();
  remembered.clear();
  reached.value = position;
  followEvents(position, stop.signal);
  const beat = async () => {
    try {
      if (document.hidden && link.peek().up) return;
      await Promise.all([readStats(), readSystem()]);
      for (const poll of polls) poll();
    } catch {
      // The banner shows this failure (`link`), and the next beat tries again.
    } finally {
      if (!stop.signal.aborted) timer = setTimeout(beat, POLL_MS);
    }
  };
  let timer = setTimeout(beat, 0);
  return () => {
    stop.abort();
    clearTimeout(timer);
    stream.value = "off";
  };
}
