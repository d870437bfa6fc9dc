// The page Now: a live list of commands on the left, one command on the right.

import { get, may } from "./api.mjs";
import { Blocks } from "./blocks.mjs";
import { clock, length, moment, now, number, span } from "./format.mjs";
import { html, useEffect, useLayoutEffect, useMemo, useRef, useState } from "./html.mjs";
import { useKeys } from "./keys.mjs";
import { foldOnce, follow, paint, painted, polled, rowOf, stats, stream } from "./live.mjs";
import { Ago, Chip, Empty, Failure, Lazy, Name, OPEN_STATES, STATES, Skeleton, VirtualList } from "./parts.mjs";
import { asOf, change, go, path, route } from "./route.mjs";

const ROW_PX = 32;
const MOST_HELD = 20_000;
const MOST_SOUGHT = 50;
const columns = (live) => ["State", "Command", "Device", live ? "Age" : "Created", "Attempts", live ? "Expires" : "", "Details"];
const detail = () => import("./command.mjs").then((module) => module.Command);

const filters = () => {
  const { query } = route.value;
  return { state: query.get("state") ?? "", type: query.get("type") ?? "", device: query.get("device") ?? "" };
};

/** The list of commands that match the filters. It is live unless `at` asks for an earlier time. */
class CommandList {
  constructor({ state, type, device }, at) {
    Object.assign(this, { state, type, device, paused: false, held: [], reading: new Set(), sought: new Set() });
    this.blocks = new Blocks((cursor, limit, stop) => this.#read({ state, type, device, as_of: at, cursor, limit, grant: false }, stop), paint);
    this.leave = at === null ? [follow((...seen) => this.#see(...seen)), polled(() => stream.peek() === "polling" && !this.paused && this.blocks.refresh())] : [];
  }

  close() {
    this.blocks.close();
    for (const leave of this.leave) leave();
  }

  /** Reads a page, and applies the events that arrived during the request. */
  async #read(query, stop) {
    const during = [];
    this.reading.add(during);
    try {
      const page = await get("/v1/commands", query, stop);
      const rows = page.data.map(rowOf);
      if (during.length) {
        const byId = new Map(rows.map((row) => [row.id, row]));
        for (const event of during) if (byId.has(event.subject)) foldOnce(byId.get(event.subject), event);
      }
      return { ...page, data: rows };
    } finally {
      this.reading.delete(during);
    }
  }

  #fits(row) {
    return (!this.state || row.state === this.state) && (!this.type || row.type === this.type) && (!this.device || row.device === this.device || row.hardware === this.device);
  }

  #see(event, row) {
    if (event.kind !== "command") return;
    for (const during of this.reading) during.push(event);
    if (this.paused) this.held.length < MOST_HELD ? this.held.push([event, row]) : (this.overrun = true);
    else this.#apply(event, row);
  }

  #apply(event, row) {
    const mine = this.blocks.known.get(event.subject);
    if (mine) {
      foldOnce(mine, event);
      if (!this.#fits(mine)) this.blocks.remove(mine.id);
    } else if (row) {
      if (this.#fits(row)) event.name === "created" ? this.blocks.insert(row) : this.blocks.place(row);
    } else if (event.name === this.state) this.#seek(event.subject);
  }

  /** Reads an older command that matches the filters only now. */
  async #seek(id) {
    if (this.sought.size >= MOST_SOUGHT || this.sought.has(id)) return;
    this.sought.add(id);
    try {
      const row = rowOf(await get(`/v1/commands/${id}`));
      if (this.#fits(row)) this.blocks.place(row);
      paint();
    } catch {
      // Only this row is missing. It appears when the list is read again.
    } finally {
      this.sought.delete(id);
    }
  }

  /** Ends the pause. Returns true if too many events came meanwhile, so that the list must be read again. */
  resume() {
    this.paused = false;
    for (const [event, row] of this.held) this.#apply(event, row);
    this.held = [];
    paint();
    return this.overrun;
  }
}

export function Now() {
  const { page, id, query } = route.value;
  const wanted = filters();
  const at = asOf.value;
  const [anew, restart] = useState(0);
  const list = useMemo(() => new CommandList(wanted, at), [wanted.state, wanted.type, wanted.device, at, anew]);
  useEffect(() => () => list.close(), [list]);
  const version = painted.value;
  useEffect(() => list.blocks.want(0, 40), [list]);
  // The old list stays visible until the list of another time is read.
  const before = useRef(list);
  if (list.blocks.started || list.blocks.error || at === null) before.current = list;
  const shown = before.current;
  const { blocks } = shown;
  const [cursor, move] = useState(-1);
  const open = page === "commands" ? id : null;
  const keep = Object.fromEntries(query);
  // Always the same function, so that unchanged rows are not drawn again.
  const select = useMemo(() => (row) => row && go(path("commands", row.id), Object.fromEntries(route.peek().query)), []);
  const step = (by) => {
    const from = cursor >= 0 ? cursor : open ? blocks.indexOf(open) : -1;
    const next = Math.max(0, Math.min(blocks.total - 1, from + by));
    move(next);
    if (open) select(blocks.at(next));
  };
  const pause = () => {
    if (list.paused) list.resume() && restart(anew + 1);
    else list.paused = true;
    paint();
  };
  useKeys({
    j: () => step(1),
    k: () => step(-1),
    p: pause,
    Enter: () => (cursor >= 0 ? select(blocks.at(cursor)) : false),
    Escape: () => (open ? go("/", keep) : cursor >= 0 ? move(-1) : false),
  });
  return html`<div class="split ${open ? "open" : ""}">
    <div class="list">
      <h1 class="offscreen">${at === null ? "Commands now" : "Commands at an earlier time"}</h1>
      ${at === null && html`<${Tiles} />`}
      <${Filters} wanted=${wanted} list=${list} pause=${pause} />
      <${Commands} list=${shown} version=${version} open=${open} cursor=${cursor} select=${select} />
    </div>
    ${open && html`<aside class="detail" aria-label="Command"><${Lazy} load=${detail} id=${open} key=${open} close=${() => go("/", keep)} /></aside>`}
  </div>`;
}

// --- figures ---------------------------------------------------------------------------------------

function Tiles() {
  const found = stats.value;
  if (!found) return html`<div class="tiles"><${Skeleton} lines="1" /></div>`;
  const { states, acknowledge, execute } = found;
  const bad = ["failed", "timed_out"].filter((name) => states[name]);
  const minutes = Math.round(found.window_sec / 60);
  return html`<div class="tiles" aria-label="The last ${minutes} minutes" role="group">
    <dl>
      <div class=${bad.length ? "bad" : ""}><dt>Failed</dt><dd>${number(states.failed + states.timed_out)}</dd><dd class="dim">or timed out, ${minutes} min</dd></div>
      <div><dt>Open</dt><dd>${number(states.pending + states.published + states.acknowledged)}</dd><dd class="dim">now</dd></div>
      <div><dt>Commands</dt><dd>${number(found.commands_per_minute)}</dd><dd class="dim">a minute</dd></div>
      <div><dt>To acknowledge</dt><dd>${length(acknowledge.p50_ms)}</dd><dd class="dim">p95 ${length(acknowledge.p95_ms)}</dd></div>
      <div><dt>To execute</dt><dd>${length(execute.p50_ms)}</dd><dd class="dim">p95 ${length(execute.p95_ms)}</dd></div>
    </dl>
    <${Strip} volume=${found.volume} />
  </div>`;
}

/** Bars of created and failed commands per piece of time. A click goes to the end of that piece. */
function Strip({ volume }) {
  const most = Math.max(1, ...volume.map((each) => Math.max(each.created, each.failed + each.timed_out)));
  const width = 100 / volume.length;
  return html`<div class="strip" role="group" aria-label="Commands created; click to go to that moment">
    ${volume.map((each) => {
      const wrong = each.failed + each.timed_out;
      const words = `${clock(Date.parse(each.at))}: ${each.created} created, ${each.executed} executed, ${wrong} failed or timed out`;
      return html`<button key=${each.at} type="button" title=${words} aria-label=${words} tabindex="-1" style=${{ width: `${width}%` }} onClick=${() => go("/", { at: each.until })}>
        <span class="all" style=${{ height: `${(100 * each.created) / most}%` }}></span>
        ${wrong > 0 && html`<span class="wrong" style=${{ height: `${Math.max(8, (100 * wrong) / most)}%` }}></span>`}
      </button>`;
    })}
  </div>`;
}

function Filters({ wanted, list, pause }) {
  const states = stats.value?.states;
  const live = asOf.value === null;
  const set = (name) => (event) => change({ [name]: event.target.value.trim() });
  return html`<div class="filters">
    <div class="states" role="group" aria-label="Only in this state">
      <button type="button" aria-pressed=${!wanted.state} onClick=${() => change({ state: "" })}>all</button>
      ${Object.keys(STATES).map((name) => html`<button key=${name} type="button" class="s-${name}" aria-pressed=${wanted.state === name} onClick=${() => change({ state: wanted.state === name ? "" : name })}>
        <span class="sign" aria-hidden="true">${STATES[name]}</span>${name.replace("_", " ")}${live && states && html`<span class="count" title=${OPEN_STATES.includes(name) ? "now" : "in the last 5 minutes"}>${number(states[name])}</span>`}</button>`)}
    </div>
    <${Only} label="Only commands of this name" placeholder="command" text=${wanted.type} set=${set("type")} />
    <${Only} label="Only of this device" placeholder="device" text=${wanted.device} set=${set("device")} />
    ${live && html`<button type="button" class="pause" aria-pressed=${list.paused} onClick=${pause}>${list.paused ? `Resume (${number(list.held.length)} new)` : "Pause"}</button>`}
  </div>`;
}

/** The field of a filter. It is drawn again with every event; what somebody is typing in it must stay. */
function Only({ label, placeholder, text, set }) {
  const field = useRef(null);
  useLayoutEffect(() => {
    field.current.value = text;
  }, [text]);
  return html`<input ref=${field} aria-label=${label} placeholder=${placeholder} onChange=${set} maxlength="64" />`;
}

// --- the list --------------------------------------------------------------------------------------

function Commands({ list, version, open, cursor, select }) {
  const { blocks } = list;
  if (blocks.error && !blocks.total) return html`<${Failure} error=${blocks.error} />`;
  if (!blocks.total) return blocks.complete ? html`<${Nothing} list=${list} />` : html`<${Skeleton} lines="12" />`;
  const row = (index) => {
    const found = blocks.at(index);
    return html`<${Row} key=${found?.id ?? index} row=${found} v=${found?.v} index=${index} open=${found !== null && found.id === open} active=${index === cursor} select=${select} />`;
  };
  return html`<${VirtualList} label="Commands, newest first" columns=${columns(asOf.value === null)} count=${blocks.total} height=${ROW_PX} above=${blocks.above}
    want=${(first, last) => blocks.want(first, last)} version=${version} row=${row} active=${cursor} />
    ${blocks.error && html`<p class="foot wrong" role="status">Older commands could not be loaded: ${blocks.error.message}. The console tries again.</p>`}`;
}

function Nothing({ list }) {
  if (list.state || list.type || list.device) {
    return html`<${Empty} title="No command fits these filters."><button type="button" onClick=${() => change({ state: "", type: "", device: "" })}>Show all</button><//>`;
  }
  if (asOf.value !== null) return html`<${Empty} title="No command existed at this time." />`;
  return html`<${Empty} title="No command yet.">
    <p>${may("devices:write") ? "Send one from a device's page or with curl:" : "With a key that has the scope devices:write:"}</p>
    <pre tabindex="0">curl ${location.origin}/v1/devices/DEVICE/commands \\
  -H "Authorization: Bearer $ORDAIN_KEY" \\
  -H 'Content-Type: application/json' -d '{"type": "unlock"}'</pre>
  <//>`;
}

function Row({ row, index, open, active, select }) {
  const seconds = now.value;
  if (row === null) return html`<div class="row waiting" role="row" aria-rowindex=${index + 2}><span role="gridcell">…</span></div>`;
  const isOpen = OPEN_STATES.includes(row.state);
  const left = row.expires === null ? null : row.expires - seconds;
  const live = asOf.value === null;
  return html`<div class="row s-row-${row.state} ${open ? "selected" : ""} ${active ? "active" : ""}" role="row" aria-rowindex=${index + 2} aria-selected=${open} onClick=${() => select(row)}>
    <span role="gridcell"><${Chip} state=${row.state} /></span>
    <span role="gridcell" class="cut"><a href=${`/console/commands/${row.id}`} title=${row.id} onClick=${(event) => event.preventDefault()}><${Name}>${row.type}<//></a></span>
    <span role="gridcell" class="cut"><${Name}>${row.hardware}<//></span>
    <span role="gridcell" class="n">${live ? html`<${Ago} at=${row.created} />` : html`<time title=${moment(row.created)}>${clock(row.created)}</time>`}</span>
    <span role="gridcell" class="n">${row.attempts || ""}</span>
    <span role="gridcell" class="n ${left !== null && left < 10_000 ? "soon" : ""}">${live && isOpen && left !== null ? span(left) : ""}</span>
    <span role="gridcell" class="cut dim" title=${row.note}><bdi>${row.note}</bdi></span>
  </div>`;
}
