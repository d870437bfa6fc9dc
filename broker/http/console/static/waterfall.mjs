// Draws the events of a command as bars to scale. Waiting is hatched, time on the device is solid, and each
// attempt has its own row.

import { clockExactly, length, nowExactly, now } from "./format.mjs";
import { html } from "./html.mjs";
import { CLOSED } from "./live.mjs";
import { asOf } from "./route.mjs";

const END_WORDS = {
  executed: "executed",
  failed: "failed",
  timed_out: "timed out",
  expired: "expired, never handed over",
  cancelled: "cancelled, never handed over",
};

/**
 * Bars: {row, kind, from, to, open, words, late}. Rows: `in lane`, `attempt n`, `on device`, `result`.
 * `until`: where bars that are still open end, ms.
 */
export function bars(events, until) {
  const found = [];
  const add = (row, kind, from, to, more = {}) => found.push({ row, kind, from, to: to ?? until, open: to === null, ...more });
  const at = (event) => Date.parse(event.recorded_at);
  const after = (index, names) => events.slice(index + 1).find((each) => names.has(each.type)) ?? null;
  const answers = new Set(["acknowledged", "progressed", "executed", "failed"]);
  const ends = new Set(["published", "timed_out", ...answers]);
  let ran = null; // end of the bar "on device"; null: the device has not answered yet
  events.forEach((event, index) => {
    const facts = `${event.evidence?.replace("_", " ") ?? "no evidence"}, position ${event.position}`;
    if (event.type === "created") {
      const next = events[index + 1] ?? null;
      add("in lane", "wait", at(event), next && at(next), { words: `waiting in its lane; ${facts}` });
    } else if (event.type === "published") {
      const next = after(index, ends);
      const unanswered = next?.type === "published" || next?.type === "timed_out";
      const how = event.data.transport === "mqtt" ? "" : ` by ${event.data.transport}`;
      add(`attempt ${event.data.attempt}${how}`, unanswered ? "lost" : "sent", at(event), next && at(next), { words: `handed over${how}${unanswered ? ", no answer" : ""}; ${facts}` });
    } else if (event.type === "acknowledged" || event.type === "progressed") {
      if (ran === null) {
        const next = events.slice(index + 1).find((each) => CLOSED.has(each.type)) ?? null;
        add("on device", next?.type === "timed_out" ? "lost" : "run", at(event), next && at(next), { late: event.data.late, words: `the device has it; ${facts}` });
        ran = next && at(next);
        if (next === null) ran = until;
      }
      if (event.type === "progressed") add("on device", "tick", at(event), at(event), { words: `${event.data.percent ?? ""} ${event.data.note ?? "progress"}; ${facts}` });
    }
    if (CLOSED.has(event.type)) {
      add("result", `end-${event.type}`, at(event), at(event), { late: event.data.late, words: `${END_WORDS[event.type]}${event.data.late ? ", late" : ""}; ${facts}` });
      ran = null;
    }
  });
  return found;
}

/** The marks of an axis in ms, at round values: about six. */
export function ticks(total) {
  const steps = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 3e4, 6e4, 12e4, 3e5, 6e5, 18e5, 36e5, 72e5, 216e5, 432e5, 864e5];
  const step = steps.find((each) => total / each <= 6) ?? Math.ceil(total / 6 / 864e5) * 864e5;
  return Array.from({ length: Math.floor(total / step) + 1 }, (_, index) => index * step);
}

export function Waterfall({ command, events }) {
  if (!events.length) return null;
  const live = asOf.value === null && !CLOSED.has(command.state);
  const last = Date.parse(events.at(-1).recorded_at);
  const until = live ? Math.max(now.value, nowExactly(), last) : last;
  const start = Date.parse(events[0].recorded_at);
  const total = Math.max(1, until - start);
  const found = bars(events, until);
  const rows = [...new Set(found.map((bar) => bar.row))];
  const left = (at) => `${(100 * (at - start)) / total}%`;
  const marks = ticks(total);
  return html`<figure class="waterfall" aria-label="Its life, to scale" data-open=${live}>
    <div class="axis" aria-hidden="true">${marks.map((mark) => html`<span key=${mark} style=${{ left: `${(100 * mark) / total}%` }}>${length(mark)}</span>`)}</div>
    ${rows.map((name) => {
      const mine = found.filter((bar) => bar.row === name);
      const spent = mine.filter((bar) => bar.kind !== "tick").reduce((sum, bar) => sum + bar.to - bar.from, 0);
      return html`<div class="fall" key=${name}>
        <span class="what">${name}</span>
        <span class="track">${mine.map((bar, index) => html`<span key=${index} class="bar b-${bar.kind} ${bar.late ? "late" : ""} ${bar.open ? "going" : ""}" role="img" tabindex="0" aria-label="${bar.words}; ${length(bar.to - bar.from)} from ${clockExactly(bar.from)}" title="${bar.words}; ${length(bar.to - bar.from)} from ${clockExactly(bar.from)}" style=${{ left: left(bar.from), width: `${(100 * (bar.to - bar.from)) / total}%` }}></span>`)}</span>
        <span class="n">${name === "result" ? "" : length(spent)}</span>
      </div>`;
    })}
    ${total > 60_000 && html`<div class="axis percent" aria-hidden="true">${[0, 25, 50, 75, 100].map((share) => html`<span key=${share} style=${{ left: `${share}%` }}>${share} %</span>`)}</div>`}
    <figcaption class="dim"><span class="key b-wait"></span> waiting <span class="key b-sent"></span> handed over <span class="key b-lost"></span> no answer <span class="key b-run"></span> on the device</figcaption>
  </figure>`;
}
