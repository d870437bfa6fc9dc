// The page of one device: its presence, its lane, its success and latency, and a form to send it a command.

import { all, encoded, get, may, post } from "./api.mjs";
import { Latency } from "./chart.mjs";
import { Lane } from "./command.mjs";
import { Form } from "./form.mjs";
import { clock, length, moment, nowExactly, number, percentile, pretty } from "./format.mjs";
import { html, useEffect, useRef, useState } from "./html.mjs";
import { follow, painted, polled, rowOf, stream } from "./live.mjs";
import { positionAt, timeOf } from "./past.mjs";
import { Ago, At, Chip, CopyButton, Empty, Failure, Id, Name, Presence, Section, Skeleton, Table, ask, useAction, useLoad } from "./parts.mjs";
import { Link, asOf, route } from "./route.mjs";

const DAY_MS = 86_400_000;
const MOST_COMMANDS = 200;
const MOST_TAIL = 50;

export function Device({ id, close }) {
  const at = asOf.value;
  const path = `/v1/devices/${encoded(id)}`;
  const { data, error, reload } = useLoad(async (stop) => {
    const [device, lane, commands] = await Promise.all([
      get(path, { as_of: at }, stop),
      get(`${path}/lane`, { as_of: at }, stop),
      all(`${path}/commands`, { as_of: at, limit: 100, grant: false }, MOST_COMMANDS, stop),
    ]);
    return { device, lane, commands: commands.data };
  }, [id, at]);
  const device = data?.device;
  const dirty = useRef(false);
  useEffect(() => {
    if (at !== null || !device) return undefined;
    const mine = (event) => event.data.device_id === device.id;
    const leave = [follow((event) => mine(event) && (dirty.current = true)), polled(() => stream.peek() === "polling" && reload())];
    // A busy device has many events a second, so it is read again at most once a second.
    const timer = setInterval(() => dirty.current && ((dirty.current = false), reload()), 1_000);
    return () => (leave.forEach((each) => each()), clearInterval(timer));
  }, [device?.id, at]);
  if (!data) {
    return html`<div class="pane"><header class="panehead"><h2>${id}</h2><button type="button" class="close" aria-label="Close" onClick=${close}>✕</button></header>
      ${error ? html`<${Failure} error=${error} retry=${reload} />` : html`<${Skeleton} lines="8" />`}</div>`;
  }
  const live = at === null;
  return html`<div class="pane">
    <header class="panehead"><h2><${Name}>${device.hardware_id}<//></h2><${Presence} presence=${device.presence} />
      <button type="button" class="close" aria-label="Close" onClick=${close}>✕</button></header>
    ${error && html`<${Failure} error=${error} showing="You see the last known state." />`}
    <p class="facts">${device.name && html`<${Name}>${device.name}<//> · `}type ${device.type} · <${Id} id=${device.id} /> · project ${device.project}
      ${device.last_seen_at && html` · presence changed <${At} at=${Date.parse(device.last_seen_at)} exact />`}</p>
    <${History} device=${device} />
    ${live && may("devices:write") && html`<${Section} title="Send a command"><${Form} device=${device} clone=${route.value.query.get("clone")} sent=${reload} /><//>`}
    <${Section} title="Lane"><${Lane} lane=${data.lane} /><//>
    <${Doing} commands=${data.commands} />
    <${Last} commands=${data.commands} />
    ${live && html`<${Unusable} device=${device} />`}
    ${live && may("events:read") && html`<${Tail} device=${device} />`}
    <${Section} title="Attributes"><pre tabindex="0">${pretty(device.attributes)}</pre><//>
    ${live && may("devices:write") && html`<${Token} device=${device} path=${path} />`}
  </div>`;
}

// --- presence --------------------------------------------------------------------------------------

/** The device's presence in the last 24 hours, drawn as a band. */
function History({ device }) {
  const at = asOf.value;
  const { data, error } = useLoad(async (stop) => {
    if (!may("events:read")) return null;
    const end = at === null ? nowExactly() : /^[0-9]+$/.test(at) ? await timeOf(Number(at), stop) : Date.parse(at);
    const from = Math.max(end - DAY_MS, Math.min(Date.parse(device.created_at), end - 1_000));
    const after = await positionAt(from, stop);
    const isOlder = Date.parse(device.created_at) < from;
    const was = isOlder ? await get(`/v1/devices/${encoded(device.id)}`, { as_of: after }, stop) : null;
    const [came, went] = await Promise.all(
      ["online", "offline"].map((event) => all("/v1/events", { device: device.id, event, after, limit: 1_000 }, 3_000, stop)),
    );
    const turns = [...came.data, ...went.data].map((each) => ({ at: Date.parse(each.time), online: each.type.includes(".online.") })).sort((one, other) => one.at - other.at);
    return { from, end, was: was?.presence ?? "never", turns: turns.filter((each) => each.at <= end) };
  }, [device.id, device.presence, at]);
  if (!may("events:read")) return html`<p class="dim">The presence history needs a key with the scope events:read.</p>`;
  if (error) return html`<${Failure} error=${error} />`;
  if (!data) return html`<${Skeleton} lines="1" />`;
  const { from, end, was, turns } = data;
  const pieces = [];
  let state = was === "online" || was === "unknown" ? "online" : was === "never" ? "never" : "offline";
  let since = from;
  for (const turn of [...turns, { at: end, online: null }]) {
    pieces.push({ state, from: since, to: turn.at });
    [state, since] = [turn.online ? "online" : "offline", turn.at];
  }
  const online = pieces.filter((piece) => piece.state === "online").reduce((sum, piece) => sum + piece.to - piece.from, 0);
  const known = pieces.filter((piece) => piece.state !== "never").reduce((sum, piece) => sum + piece.to - piece.from, 0);
  const words = known ? `online ${number((100 * online) / known)} % of ${length(known)}; connections: ${turns.filter((turn) => turn.online).length}` : "no connection in the last 24 h";
  return html`<figure class="band" aria-label="Presence, 24 hours">
    <div class="pieces" role="img" aria-label=${words}>${pieces.map((piece, index) => html`<span key=${index} class="piece ${piece.state}" title="${piece.state === "never" ? "not heard yet" : piece.state} from ${clock(piece.from)} to ${clock(piece.to)}" style=${{ width: `${(100 * (piece.to - piece.from)) / (end - from)}%` }}></span>`)}</div>
    <figcaption class="dim"><span>${end - from < DAY_MS ? "registered" : "24 h ago"}</span><span>${words}</span><span>${at === null ? "now" : "then"}</span></figcaption>
  </figure>`;
}

// --- success and latency ---------------------------------------------------------------------------

function Doing({ commands }) {
  const closed = commands.filter((each) => ["executed", "failed", "timed_out"].includes(each.state));
  const names = [...new Set(closed.map((each) => each.type))];
  if (!names.length) return null;
  const rows = names.map((name) => {
    const mine = closed.filter((each) => each.type === name);
    const done = mine.filter((each) => each.state === "executed");
    const took = done.filter((each) => each.published_at && each.executed_at).map((each) => Date.parse(each.executed_at) - Date.parse(each.published_at)).sort((one, other) => one - other);
    const share = (100 * done.length) / mine.length;
    return [html`<${Name}>${name}<//>`, number(mine.length), html`<span class="share"><span class="fill ${share < 90 ? "low" : ""}" style=${{ width: `${share}%` }}></span></span> ${number(share)} %`, length(percentile(took, 0.5)), length(percentile(took, 0.95))];
  });
  return html`<${Section} title="Success and latency" aside=${html`<span class="dim">${commands.length === 1 ? "one command" : `last ${number(commands.length)} commands`}, measured from hand-over</span>`}>
    <${Table} label="By command" head=${["Command", "Closed", "Executed", "p50", "p95"]} numbers=${[1, 3, 4]} rows=${rows} />
    <${Latency} commands=${closed} />
  <//>`;
}

function Last({ commands }) {
  if (!commands.length) return html`<${Empty} title="No commands yet." />`;
  return html`<${Section} title="Last commands" aside=${html`<${Link} to="/" query=${{ device: commands[0].hardware_id }}>all<//>`}>
    <${Table} label="Last commands" head=${["State", "Command", "When", "Details"]} rows=${commands.slice(0, 10).map((each) => {
      const created = Date.parse(each.created_at);
      return [html`<${Chip} state=${each.state} />`, html`<${Link} to=${`/commands/${each.id}`}><${Name}>${each.type}<//><//>`, asOf.value === null ? html`<${Ago} at=${created} />` : html`<${At} at=${created} />`, html`<bdi class="dim">${rowOf(each).note}</bdi>`];
    })} />
  <//>`;
}

function Unusable({ device }) {
  const { data } = useLoad((stop) => get("/v1/unmatched", { device: device.id, limit: 10 }, stop), [device.id, device.last_seen_at]);
  if (!data?.data.length) return null;
  return html`<${Section} title="Unusable answers"><${UnmatchedTable} rows=${data.data} /><//>`;
}

export function UnmatchedTable({ rows, withDevice = false }) {
  return html`<${Table} label="Unusable answers" head=${["When", ...(withDevice ? ["Device"] : []), "Why", "Command", "Said"]}
    rows=${rows.map((each) => [
      html`<${Ago} at=${Date.parse(each.at)} />`,
      ...(withDevice ? [each.device_id ? html`<${Link} to=${`/devices/${encoded(each.device_id)}`}>${each.topic.split("/").at(-2) ?? each.device_id}<//>` : html`<bdi class="dim">${each.topic}</bdi>`] : []),
      each.reason.replaceAll("_", " "),
      each.command_id ? html`<${Link} to=${`/commands/${encoded(each.command_id)}`}>${each.command_id.slice(0, 16)}<//>` : "–",
      html`<code class="data" title=${each.topic}>${each.payload}</code>`,
    ])} />`;
}

// --- live ------------------------------------------------------------------------------------------

function Tail({ device }) {
  const seen = useRef([]);
  useEffect(() => {
    seen.current = [];
    return follow((event) => {
      if (event.data.device_id !== device.id) return;
      seen.current.unshift(event);
      seen.current.length = Math.min(seen.current.length, MOST_TAIL);
    });
  }, [device.id]);
  painted.value;
  return html`<${Section} title="Live" aside=${html`<span class="dim">events of this device</span>`}>
    ${seen.current.length ? html`<ol class="tail">${seen.current.map((event) => html`<li key=${event.id}><time title=${moment(Date.parse(event.time))}>${clock(Date.parse(event.time))}</time> <span class="eventname s-${event.name}">${event.name.replace("_", " ")}</span> ${event.kind === "command" ? html`<${Link} to=${`/commands/${event.subject}`}><${Name}>${event.data.type ?? event.subject}<//><//>` : ""}</li>`)}</ol>` : html`<p class="dim">No events since you opened this page.</p>`}
  <//>`;
}

function Token({ device, path }) {
  const [made, show] = useState(null);
  const [rotate, { busy, error }] = useAction(async () => {
    if (await ask({ title: `Give ${device.hardware_id} a new token?`, what: "The old token stops working at once. The device is disconnected and cannot connect until it has the new token. The new token is shown only once.", yes: "Create a new token" })) {
      show(await post(`${path}/token`));
    }
  });
  return html`<${Section} title="Token">
    ${made ? html`<p>Shown only once. It is also the device's MQTT password.</p><pre tabindex="0">${made.device_token}</pre>${made.device_secret && html`<p>Secret for its grants:</p><pre tabindex="0">${made.device_secret}</pre>`}<${CopyButton} text=${made.device_token}>Copy the token<//>` : html`<button type="button" disabled=${busy} onClick=${rotate}>New token…</button>`}
    ${error && html`<p class="wrong" role="alert">${error.message}</p>`}
  <//>`;
}
