// Converts between positions of the log and times. The API has events by position, each with its time.

import { get, system } from "./api.mjs";
import { nowExactly } from "./format.mjs";

/** The first event after a position that this key may see; null if there is none. */
export async function eventAfter(position, stop) {
  const page = await get("/v1/events", { after: Math.max(0, position), limit: 1 }, stop);
  return page.data[0] ?? null;
}

/** The time of a position in ms: that of its event, or of the next event that this key may see. */
export async function timeOf(position, stop) {
  if (position <= 0) position = 1;
  const event = await eventAfter(position - 1, stop);
  return event ? Date.parse(event.time) : nowExactly();
}

/** The position of the last event at or before a time (ms). A binary search: about twenty short requests. */
export async function positionAt(at, stop) {
  let low = 0;
  let high = system.peek().position;
  while (low < high) {
    const middle = Math.floor((low + high) / 2);
    const event = await eventAfter(middle, stop);
    if (event === null || Number(event.id) > high || Date.parse(event.time) > at) high = middle;
    else low = Number(event.id);
  }
  return low;
}
