// The page System: the broker, its connections, the lag of its subscribers, and its limits.

import { all, call, encoded, get, may, post, system } from "./api.mjs";
import { UnmatchedTable } from "./device.mjs";
import { bytes, length, moment, number, pretty, span } from "./format.mjs";
import { html, useEffect, useState } from "./html.mjs";
import { polled } from "./live.mjs";
import { At, CopyButton, Empty, Failure, Id, Section, Skeleton, Table, ask, useAction, useLoad } from "./parts.mjs";
import { asOf } from "./route.mjs";

const NEAR = 0.8;
const SCOPES = ["devices:read", "devices:write", "events:read", "admin"];

export function System() {
  const found = system.value;
  return html`<div class="columns">
    <h1 class="offscreen">System</h1>
    ${asOf.value !== null && html`<p class="wide dim">This page shows the present only.</p>`}
    ${found.not_ready.length > 0 && html`<div class="failure wide" role="alert"><p><strong>Not ready:</strong></p><ul>${found.not_ready.map((why) => html`<li key=${why}>${why}</li>`)}</ul></div>`}
    <${Broker} found=${found} />
    <${Link} found=${found} />
    <${Log} found=${found} />
    <${Followers} found=${found} />
    <${Limits} limits=${found.limits ?? []} />
    ${found.nodes?.length > 1 && html`<${Nodes} nodes=${found.nodes} />`}
    <${Types} />
    <${Unmatched} />
    ${may("admin") && html`<${Keys} />`}
    <${Section} title="Settings"><pre tabindex="0">${pretty(found.settings)}</pre><//>
  </div>`;
}

/** A list of all fields, also those that a newer release adds. */
function pairs(fields) {
  return html`<dl class="pairs">${Object.entries(fields)
    .filter(([, value]) => value !== null && value !== undefined)
    .map(([name, value]) => html`<dt key=${name}>${name.replaceAll("_", " ")}</dt><dd>${typeof value === "object" && value.type === undefined ? html`<code>${JSON.stringify(value)}</code>` : value === true ? "yes" : value === false ? "no" : value}</dd>`)}</dl>`;
}

function Broker({ found }) {
  return html`<${Section} title="Broker" aside=${html`<span class=${found.not_ready.length ? "bad" : "good"}>${found.not_ready.length ? "✕ not ready" : "✓ ready"}</span>`}>
    ${pairs({
      release: found.release,
      uptime: found.uptime_sec === null ? null : span(found.uptime_sec * 1_000),
      "log id": html`<${Id} id=${found.log_id} whole />`,
      devices: `${number(found.devices.online)} of ${number(found.devices.known)} online`,
      "open commands": number(found.open_commands),
      clock: Math.abs(found.clock.step_ms) > 5_000 ? `stepped by ${length(found.clock.step_ms)}` : moment(Date.parse(found.clock.now)),
    })}
  <//>`;
}

// MQTT 5.0, section 2.4.
const ENDED = {
  "0x81": "malformed packet", "0x82": "protocol error", "0x84": "unsupported protocol version", "0x85": "client id not valid",
  "0x86": "bad user name or password", "0x87": "not authorized", "0x88": "server unavailable", "0x89": "server busy",
  "0x8a": "banned", "0x8b": "server stopping", "0x8c": "bad authentication method", "0x8d": "keep alive timeout",
  "0x8e": "taken over by a new connection", "0x90": "topic not valid", "0x93": "too many messages without PUBACK", "0x95": "packet too large",
  "0x96": "message rate too high", "0x97": "quota exceeded", "0x98": "administrative action", "0x99": "payload format invalid",
  "0x9b": "QoS not supported", "0x9f": "connection rate exceeded",
};

function Link({ found }) {
  const { kind, up, url, listener } = found.mqtt;
  const title = kind === "external" ? "MQTT server" : "MQTT listener";
  return html`<${Section} title=${title} aside=${html`<span class=${up ? "good" : "bad"}>${up ? "✓ up" : "✕ down"}</span>`}>
    ${pairs({ kind, address: html`<code>${url}</code>`, ...(listener && { connections: number(listener.connections), "devices connected": number(listener.devices), "topics denied": number(listener.denied), "taken over": number(listener.taken_over) }) })}
    ${listener && Object.keys(listener.ended).length > 0 && html`<h3>Connections refused or ended by the broker</h3>${pairs(Object.fromEntries(Object.entries(listener.ended).map(([code, count]) => [`${ENDED[code] ?? "reason"} (${code})`, number(count)])))}`}
  <//>`;
}

function Log({ found }) {
  const { log, verify, position } = found;
  const [start, { busy, error }] = useAction(() => post("/v1/system/verify").then((answer) => (system.value = { ...system.peek(), verify: answer })));
  const running = verify?.state === "running";
  return html`<${Section} title="Log">
    ${pairs({
      events: number(position),
      "since": log?.first_at ? html`<${At} at=${Date.parse(log.first_at)} exact />` : null,
      size: log ? bytes(log.bytes) : null,
      "append, until durable": log?.append_p50_ms === null || !log ? null : `p50 ${length(log.append_p50_ms)}, p95 ${length(log.append_p95_ms)}`,
    })}
    <div class="actions">
      ${may("admin") && html`<button type="button" disabled=${busy || running} onClick=${start}>Verify the chain</button>`}
      ${verify && html`<span role="status" class=${verify.state === "bad" ? "bad" : verify.state === "good" ? "good" : ""}>${told(verify)}</span>`}
    </div>
    ${running && html`<progress max=${verify.of} value=${verify.rows} aria-label="Verifying"></progress>`}
    ${error && html`<p class="wrong" role="alert">${error.message}</p>`}
  <//>`;
}

function told(verify) {
  const rows = number(verify.rows);
  if (verify.state === "running") return `${rows} of ${number(verify.of)} rows are good so far`;
  if (verify.state === "good") return `✓ ${rows} rows, no fault (${moment(Date.parse(verify.finished_at))})`;
  return `✕ ${verify.fault ?? "it could not be read completely"} (${rows} rows before it are good)`;
}

// --- subscribers -------------------------------------------------------------------------------------

function Followers({ found }) {
  const able = may("devices:write");
  const { data, error, reload } = useLoad(async (stop) => {
    if (!able) return { webhooks: [], last: {} };
    const { data: webhooks } = await all("/v1/webhooks", { limit: 100 }, 200, stop);
    const failing = webhooks.filter((each) => each.failing || each.state !== "active").slice(0, 20);
    const last = await Promise.all(failing.map((each) => get(`/v1/webhooks/${each.id}/deliveries`, { limit: 1 }, stop).then((page) => [each.id, page.data[0]])));
    return { webhooks, last: Object.fromEntries(last) };
  }, [able]);
  useEffect(() => polled(reload), []);
  const [resume, resuming] = useAction((id) => post(`/v1/webhooks/${id}/resume`).then(reload));
  const rows = (found.subscribers ?? []).map((each) => [each.name, number(each.lag), each.note ?? "", ""]);
  for (const each of data?.webhooks ?? []) {
    const attempt = data.last[each.id];
    const why = each.reason ?? (each.failing ? `${attempt?.error ?? `answered ${attempt?.status}`}; ${each.failing.attempts} attempts since ${moment(Date.parse(each.failing.since))}` : "");
    rows.push([
      html`webhook <bdi title=${each.url}>${each.name ?? each.url}</bdi>`,
      number(each.lag),
      html`<span class=${each.state === "active" && !each.failing ? "" : "bad"}>${each.state === "active" ? "" : `${each.state}: `}<bdi>${why}</bdi></span>`,
      each.state === "paused" ? html`<button type="button" disabled=${resuming.busy} onClick=${() => resume(each.id)}>Resume</button>` : "",
    ]);
  }
  return html`<${Section} title="Subscribers" aside=${html`<span class="dim">lag in events</span>`}>
    <${Table} label="Subscribers" head=${["Subscriber", "Lag", "Note or last error", ""]} numbers=${[1]} rows=${rows} />
    ${!able && html`<p class="dim">Webhooks are shown to keys with the scope devices:write.</p>`}
    ${(error ?? resuming.error) && html`<${Failure} error=${error ?? resuming.error} />`}
  <//>`;
}

function Limits({ limits }) {
  if (!limits.length) return null;
  return html`<${Section} title="Limits">
    ${limits.map(({ name, used, most }) => html`<div class="limit ${used >= most * NEAR ? "near" : ""}" key=${name}><span>${name}</span><span class="share" role="img" aria-label="${number(used)} of ${number(most)}"><span class="fill" style=${{ width: `${Math.min(100, (100 * used) / Math.max(1, most))}%` }}></span></span><span class="n">${number(used)} of ${number(most)}${used >= most * NEAR ? " ⚠" : ""}</span></div>`)}
  <//>`;
}

function Nodes({ nodes }) {
  return html`<${Section} title="Nodes">${nodes.map((node) => html`<div key=${node.id ?? node.name}>${pairs(node)}</div>`)}<//>`;
}

function Unmatched() {
  const { data, error, reload } = useLoad((stop) => get("/v1/unmatched", { limit: 20 }, stop), []);
  useEffect(() => polled(reload), []);
  return html`<section class="wide"><header><h2>Unmatched answers</h2></header>
    ${error && html`<${Failure} error=${error} />`}
    ${!data && !error && html`<${Skeleton} />`}
    ${data && (data.data.length ? html`<${UnmatchedTable} rows=${data.data} withDevice />` : html`<${Empty} title="No unmatched answers." />`)}
  </section>`;
}

function Types() {
  const { data, error } = useLoad((stop) => get("/v1/types", {}, stop), []);
  return html`<${Section} title="Device types">
    ${error && html`<${Failure} error=${error} />`}
    ${data && html`<${Table} label="Device types" head=${["Type", "Payload", "Presence", "Commands"]} rows=${data.data.map((each) => [html`<span title=${each.title ?? ""}>${each.name}</span>`, each.payload, each.presence, each.open ? ["any", ...each.commands.map((one) => one.name)].join(", ") : each.commands.map((one) => one.name).join(", ")])} />`}
  <//>`;
}

// --- keys --------------------------------------------------------------------------------------------

const at = (time) => (time ? html`<${At} at=${Date.parse(time)} exact />` : "–");

/** The devices that a key is limited to. */
function deviceSet(key) {
  const named = [...(key.devices ?? []), ...(key.device_prefixes ?? []).map((prefix) => `${prefix}…`)];
  return named.length ? html`<bdi title=${named.join("\n")}>${named.slice(0, 3).join(" ")}${named.length > 3 ? ` and ${named.length - 3} more` : ""}</bdi>` : "all";
}

/** The rates of a key that differ from the settings. */
function rates(key) {
  const found = [["commands", key.commands_per_minute], ["requests", key.requests_per_minute]].filter(([, most]) => most !== null);
  return found.map(([what, most]) => (most ? `${number(most)} ${what} a minute` : `${what} without limit`)).join(", ") || "–";
}

function Keys() {
  const { data, error, reload } = useLoad((stop) => get("/v1/keys", {}, stop), []);
  const [made, show] = useState(null);
  const own = system.value.caller?.key_id ?? null;
  const [create, creating] = useAction(async (form) => {
    const fields = new FormData(form);
    const body = { project: fields.get("project"), scopes: fields.getAll("scope"), name: fields.get("name") || null };
    const days = Number(fields.get("days"));
    if (days) body.expires_in_sec = days * 86400;
    const devices = fields.get("devices").split(/[\s,]+/).filter(Boolean);
    const prefixes = devices.filter((name) => name.endsWith("*")).map((name) => name.slice(0, -1));
    const names = devices.filter((name) => !name.endsWith("*"));
    if (names.length) body.devices = names;
    if (prefixes.length) body.device_prefixes = prefixes;
    if (!body.scopes.length) throw new Error("Select at least one scope.");
    show(await post("/v1/keys", body));
    form.reset();
    reload();
  });
  const [revoke, revoking] = useAction(async (key) => {
    const mine = key.id === own ? " You are signed in with this key, so this console stops working." : "";
    if (await ask({ title: `Revoke ${key.name ?? key.id}?`, what: `Requests with this key are refused at once and its event streams end. Commands that it created are not affected. This cannot be undone.${mine}`, yes: "Revoke the key" })) {
      await call("DELETE", `/v1/keys/${encoded(key.id)}`);
      reload();
    }
  });
  const submit = (event) => {
    event.preventDefault();
    create(event.currentTarget);
  };
  return html`<section class="wide"><header><h2>API keys</h2></header>
    ${error && html`<${Failure} error=${error} retry=${reload} />`}
    ${data && html`<${Table} label="API keys" head=${["Name", "Id", "Project", "Scopes", "Devices", "Limits", "Created", "Expires", "Last used", ""]} rows=${data.data.map((key) => [html`<bdi>${key.name ?? "–"}</bdi>`, html`<${Id} id=${key.id} />`, key.project, key.scopes.join(" "), deviceSet(key), rates(key), at(key.created_at), at(key.expires_at), at(key.last_used_at), key.state !== "active" ? html`<span class="dim" title=${key.revoked_at ? moment(Date.parse(key.revoked_at)) : ""}>${key.state}</span>` : html`<button type="button" disabled=${revoking.busy} onClick=${() => revoke(key)}>Revoke…</button>`])} />`}
    ${revoking.error && html`<p class="wrong" role="alert">${revoking.error.message}</p>`}
    <form class="newkey" onSubmit=${submit}>
      <label><span>Project</span><input name="project" required maxlength="64" pattern="[A-Za-z0-9][A-Za-z0-9_\\-]*" /></label>
      <label><span>Name</span><input name="name" maxlength="200" /></label>
      <label><span>Days until it expires</span><input name="days" type="number" min="1" max="3650" placeholder="never" /></label>
      <label><span>Only these devices</span><input name="devices" placeholder="all; or door-7 lamp-*" /></label>
      <fieldset><legend>Scopes</legend>${SCOPES.map((scope) => html`<label key=${scope}><input type="checkbox" name="scope" value=${scope} /> ${scope}</label>`)}</fieldset>
      <button type="submit" class="primary" disabled=${creating.busy}>Create key</button>
    </form>
    ${creating.error && html`<p class="wrong" role="alert">${creating.error.message}</p>`}
    ${made && html`<div class="once" role="status"><p>Shown only once:</p><pre tabindex="0">${made.key}</pre><${CopyButton} text=${made.key}>Copy the key<//></div>`}
  </section>`;
}
