// The page of one command: its explanation, a waterfall of its events, its evidence, and the actions on it.

import { call, encoded, get, may, post } from "./api.mjs";
import { html, useEffect, useState } from "./html.mjs";
import { useKeys } from "./keys.mjs";
import { CLOSED, follow, polled, stream } from "./live.mjs";
import { length, moment, pretty, visible } from "./format.mjs";
import { At, Chip, CopyButton, Failure, Id, Name, Skeleton, Table, ask, useAction, useLoad } from "./parts.mjs";
import { Link, asOf, change, go } from "./route.mjs";
import { Waterfall } from "./waterfall.mjs";
import { snippets } from "./snippets.mjs";

const RETRIABLE = new Set(["failed", "timed_out", "expired", "cancelled"]);
const TABS = ["Events", "Payload & topic", "Grant", "Raw", "Same lane"];

/** The command with its events. `at`: as they were at that position or time; null: now, with the explanation. */
async function load(id, at, stop) {
  const path = `/v1/commands/${encoded(id)}`;
  const [command, page] = await Promise.all([get(path, { as_of: at }, stop), get(`${path}/events`, { limit: 1_000 }, stop)]);
  const position = /^[0-9]+$/.test(at ?? "") ? Number(at) : null;
  const until = at !== null && position === null ? Date.parse(at) : Infinity;
  const events = page.data.filter((each) => (position === null || each.position <= position) && Date.parse(each.recorded_at) <= until);
  const explanation = at === null ? await get(`${path}/explain`, {}, stop) : null;
  return { command, events, explanation };
}

export function Command({ id, close }) {
  const at = asOf.value;
  const { data, error, reload } = useLoad((stop) => load(id, at, stop), [id, at]);
  useEffect(() => {
    if (at !== null) return undefined;
    const leave = [follow((event) => event.subject === id && reload()), polled(() => (stream.peek() === "polling" || data?.explanation?.next) && reload())];
    return () => leave.forEach((each) => each());
  }, [id, at, data?.explanation?.next !== null]);
  const [tab, open] = useState(TABS[0]);
  if (!data) {
    return html`<div class="pane"><${Head} close=${close} title=${id} />${error ? html`<${Failure} error=${error} retry=${reload} />` : html`<${Skeleton} lines="8" />`}</div>`;
  }
  const { command, events, explanation } = data;
  return html`<div class="pane">
    <${Head} close=${close} title=${html`<${Name}>${command.type}<//>`}>
      <${Chip} state=${command.state} />
    <//>
    ${error && html`<${Failure} error=${error} showing="You see the last known state." />`}
    ${explanation && html`<p class="explain">${visible(explanation.summary)}</p>`}
    <p class="facts">
      to <${Link} to=${`/devices/${encoded(command.hardware_id)}`}><${Name}>${command.hardware_id}<//><//> · <${Id} id=${command.id} /> · created <${At} at=${Date.parse(command.created_at)} exact />
      ${command.retry_of && html` · retry of <${Link} to=${`/commands/${command.retry_of}`}>${command.retry_of.slice(0, 8)}…${command.retry_of.slice(-4)}<//>`}
    </p>
    <${Actions} command=${command} events=${events} />
    <${Waterfall} command=${command} events=${events} />
    <div class="tabs" role="tablist" aria-label="About this command">${TABS.map((name) => html`<button key=${name} type="button" role="tab" aria-selected=${name === tab} onClick=${() => open(name)}>${name}</button>`)}</div>
    <div role="tabpanel" aria-label=${tab}>
      ${tab === "Events" && html`<${Events} events=${events} />`}
      ${tab === "Payload & topic" && html`<${Payload} command=${command} events=${events} />`}
      ${tab === "Grant" && html`<${Grant} token=${command.grant_token} />`}
      ${tab === "Raw" && html`<div class="copies"><${CopyButton} text=${pretty({ command, events })}>Copy JSON<//></div><pre tabindex="0">${pretty({ ...command, grant_token: command.grant_token ? "…" : null })}</pre><pre tabindex="0">${pretty(events)}</pre>`}
      ${tab === "Same lane" && html`<${SameLane} command=${command} />`}
    </div>
  </div>`;
}

function Head({ close, title, children }) {
  return html`<header class="panehead"><h2>${title}</h2>${children}<button type="button" class="close" aria-label="Close" onClick=${close}>✕</button></header>`;
}

// --- actions ---------------------------------------------------------------------------------------

function Actions({ command, events }) {
  const { id, state, type, hardware_id: device } = command;
  const [cancel, cancelling] = useAction(async () => {
    if (await ask({ title: `Cancel ${type} to ${device}?`, what: "The command was not handed over yet. It will never be sent. You can retry it later as a new command.", yes: "Cancel the command" })) {
      await call("DELETE", `/v1/devices/${encoded(command.device_id)}/commands/${id}`);
    }
  });
  const [retry, retrying] = useAction(async () => {
    const repeats = state === "timed_out" ? " The device may have executed the old command already, so it could be executed twice." : "";
    if (await ask({ title: `Retry ${type} to ${device}?`, what: `A new command with the same parameters and TTL goes to the end of the lane.${repeats}`, yes: "Retry", danger: repeats !== "" })) {
      const made = await post(`/v1/commands/${id}/retry`, { idempotency_key: `console-retry-${id}-${events.at(-1).version}` });
      go(`/commands/${made.id}`);
    }
  });
  const [abandon, abandoning] = useAction(async () => {
    const answer = await ask({ title: `Abandon ${type} to ${device}?`, what: "The command becomes timed out and the next command in the lane is sent. The device may still execute it; a late answer is still recorded.", yes: "Abandon", field: "Reason" });
    if (answer) await post(`/v1/commands/${id}/abandon`, { reason: answer.text || null });
  });
  const able = may("devices:write") && asOf.value === null;
  const keys = {
    c: () => (able && state === "pending" ? void cancel() : false),
    r: () => (able && RETRIABLE.has(state) ? void retry() : false),
    t: () => change({ at: String(events.at(-1).position) }),
  };
  useKeys(keys);
  const failed = cancelling.error ?? retrying.error ?? abandoning.error;
  return html`<div class="actions" role="group" aria-label="Actions">
    ${able && state === "pending" && html`<button type="button" disabled=${cancelling.busy} onClick=${cancel}>Cancel</button>`}
    ${able && RETRIABLE.has(state) && html`<button type="button" disabled=${retrying.busy} onClick=${retry}>Retry</button>`}
    ${able && !CLOSED.has(state) && state !== "pending" && html`<button type="button" disabled=${abandoning.busy} onClick=${abandon}>Abandon</button>`}
    ${able && html`<button type="button" onClick=${() => go(`/devices/${encoded(device)}`, { clone: id })}>Clone</button>`}
    <${CopyAs} command=${command} />
    ${asOf.value === null && html`<button type="button" title="Show all pages as they were at its last event" onClick=${keys.t}>Show at this time</button>`}
    ${failed && html`<p class="wrong" role="alert">${failed.message}</p>`}
  </div>`;
}

function CopyAs({ command }) {
  const all = snippets(command, location.origin);
  return html`<details class="menu left"><summary>Copy as</summary><div class="sheet">
    ${Object.entries(all).map(([name, text]) => html`<${CopyButton} key=${name} text=${text}>${name}<//>`)}
  </div></details>`;
}

// --- tabs ------------------------------------------------------------------------------------------

function Events({ events }) {
  const first = Date.parse(events[0]?.recorded_at);
  return html`<${Table} label="Events" head=${["Event", "After", "Evidence", "Position", "Details"]} numbers=${[1, 3]}
    rows=${events.map((each) => [
      html`<${EventName} event=${each} />`,
      html`<span title=${moment(Date.parse(each.recorded_at))}>${length(Date.parse(each.recorded_at) - first)}</span>`,
      html`<span class="once">${each.evidence?.replace("_", " ") ?? "–"}</span>`,
      html`<button type="button" class="id" title="Show all pages as they were then" onClick=${() => change({ at: String(each.position) })}>${each.position}</button>`,
      html`<code class="data">${each.erased ? "erased" : visible(detailOf(each))}</code>`,
    ])} />`;
}

const EventName = ({ event }) => html`<span class="s-${event.type === "created" ? "pending" : event.type === "progressed" ? "acknowledged" : event.type} eventname">${event.type.replace("_", " ")}${event.data?.late ? " (late)" : ""}</span>`;

function detailOf({ type, data }) {
  const { topic, definition, device_type, hardware_id, params, type: name, ttl_ms, ...rest } = data;
  const shown = type === "created" ? { params, ...rest } : { ...rest };
  delete shown.late;
  return Object.entries(shown)
    .filter(([, value]) => value !== null && value !== undefined)
    .map(([field, value]) => `${field} ${typeof value === "string" ? value : JSON.stringify(value)}`)
    .join(" · ");
}

function Payload({ command, events }) {
  const created = events[0]?.data ?? {};
  return html`<dl class="pairs">
    <dt>Topic</dt><dd>${created.topic ? html`<code>${created.topic}</code>` : "not sent by MQTT, or erased"}</dd>
    <dt>Device type</dt><dd>${created.device_type ?? "–"}</dd>
    <dt>Expires</dt><dd>${command.expires_at ? moment(Date.parse(command.expires_at)) : "never"}</dd>
    </dl>
    <h3>Parameters</h3><pre tabindex="0">${pretty(command.params)}</pre>
    ${command.result !== null && html`<h3>Result</h3><pre tabindex="0">${pretty(command.result)}</pre>`}
    ${command.error !== null && html`<h3>Error</h3><pre tabindex="0">${pretty(command.error)}</pre>`}`;
}

function claims(token) {
  try {
    const [head, body] = token.split(".").slice(0, 2).map((part) => {
      const bytes = Uint8Array.from(atob(part.replace(/-/g, "+").replace(/_/g, "/")), (one) => one.charCodeAt(0));
      return JSON.parse(new TextDecoder().decode(bytes));
    });
    return { head, body };
  } catch {
    return null;
  }
}

function Grant({ token }) {
  if (!token) {
    const why = asOf.value !== null ? "Grants are not shown for the past." : may("devices:write") ? "This device type uses no grants." : "Only keys with the scope devices:write see grants.";
    return html`<p class="dim">No grant. ${why}</p>`;
  }
  const found = claims(token);
  if (!found) return html`<p class="dim">The grant cannot be read here.</p>`;
  const times = ["iat", "nbf", "exp"].filter((name) => typeof found.body[name] === "number");
  return html`<p class="dim">The device checks these claims before it executes the command. Keep the token secret.</p>
    <dl class="pairs">${Object.entries({ ...found.head, ...found.body }).map(([name, value]) => html`<dt key=${name}>${name}</dt><dd><code>${typeof value === "string" ? value : JSON.stringify(value)}</code>${times.includes(name) && html` <span class="dim">${moment(value * 1_000)}</span>`}</dd>`)}</dl>
    <${CopyButton} text=${token}>Copy the token<//>`;
}

function SameLane({ command }) {
  const { data, error } = useLoad((stop) => get(`/v1/devices/${encoded(command.device_id)}/lane`, { as_of: asOf.peek() }, stop), [command.id, command.state, asOf.value]);
  if (error) return html`<${Failure} error=${error} />`;
  if (!data) return html`<${Skeleton} />`;
  return html`<${Lane} lane=${data} own=${command.id} />`;
}

/** The open commands of a device in order, and what each waits for. */
export function Lane({ lane, own = null }) {
  if (!lane.open.length) return html`<p class="dim">The lane is empty.</p>`;
  return html`<p class="dim">${lane.in_flight} of ${lane.window} at a time with the device${lane.shut_until ? "; closed for a moment, because an answer without an id may belong to the previous command" : ""}.</p>
  <ol class="lane">${lane.open.map((each, place) => html`<li key=${each.id} class=${each.id === own ? "own" : ""}>
    <${Chip} state=${each.state} /> <${Link} to=${`/commands/${each.id}`}><${Name}>${each.type}<//><//>${" "}
    <span class="dim">${waits(each, place, lane)}</span></li>`)}</ol>`;
}

const ACTIONS = { hand_over: "next attempt", back_off: "no answer yet, next attempt after", hold: "no answer yet, held from", give_up: "times out", expire: "expires" };

function waits(each, place, lane) {
  if (each.state === "pending" && place >= lane.window) return `behind ${lane.open[place - 1].type} (${place} before it)`;
  if (!each.next) return "";
  return `${ACTIONS[each.next.action] ?? each.next.action}${each.next.at ? `: ${moment(Date.parse(each.next.at))}` : ""}`;
}
