// The page Devices: the list on the left, one device on the right.

import { get, may, system } from "./api.mjs";
import { Blocks } from "./blocks.mjs";
import { now, number } from "./format.mjs";
import { html, useEffect, useMemo, useRef, useState } from "./html.mjs";
import { useKeys } from "./keys.mjs";
import { follow, paint, painted, polled, stream } from "./live.mjs";
import { Ago, At, Empty, Failure, Lazy, Name, Presence, Skeleton, VirtualList } from "./parts.mjs";
import { asOf, go, path, route } from "./route.mjs";

const ROW_PX = 32;
const COLUMNS = ["Presence", "Device", "Name", "Type", "Presence changed"];
const detail = () => import("./device.mjs").then((module) => module.Device);

function rowOf(device) {
  return {
    id: device.id,
    hardware: device.hardware_id,
    name: device.name,
    type: device.type,
    presence: device.presence,
    seen: device.last_seen_at ? Date.parse(device.last_seen_at) : null,
    created: Date.parse(device.created_at),
    v: 0,
  };
}

class DeviceList {
  constructor(at) {
    this.blocks = new Blocks(async (cursor, limit, stop) => {
      const page = await get("/v1/devices", { as_of: at, cursor, limit }, stop);
      return { ...page, data: page.data.map(rowOf) };
    }, paint);
    this.leave = at === null ? [follow((event) => this.#see(event)), polled(() => stream.peek() === "polling" && this.blocks.refresh())] : [];
  }

  close() {
    this.blocks.close();
    for (const leave of this.leave) leave();
  }

  #see({ kind, name, subject, time, data }) {
    if (kind !== "device") return;
    const row = this.blocks.known.get(subject);
    if (name === "registered") {
      this.blocks.insert({ id: subject, hardware: data.hardware_id, name: data.name ?? null, type: data.device_type, presence: "never", seen: null, created: Date.parse(time), v: 0 });
    } else if (name === "deleted") this.blocks.remove(subject);
    else if (row && (name === "online" || name === "offline")) Object.assign(row, { presence: name, seen: Date.parse(time), v: row.v + 1 });
    else if (row && name === "changed") Object.assign(row, { type: data.device_type ?? row.type, name: "name" in data ? data.name : row.name, v: row.v + 1 });
  }
}

export function Devices() {
  const { id } = route.value;
  const at = asOf.value;
  const list = useMemo(() => new DeviceList(at), [at]);
  useEffect(() => () => list.close(), [list]);
  const version = painted.value;
  useEffect(() => list.blocks.want(0, 40), [list]);
  const before = useRef(list);
  if (list.blocks.started || list.blocks.error || at === null) before.current = list;
  const { blocks } = before.current;
  const [cursor, move] = useState(-1);
  const select = useMemo(() => (row) => row && go(path("devices", row.hardware)), []);
  const step = (by) => {
    const next = Math.max(0, Math.min(blocks.total - 1, cursor + by));
    move(next);
    if (id) select(blocks.at(next));
  };
  useKeys({
    j: () => step(1),
    k: () => step(-1),
    Enter: () => (cursor >= 0 ? select(blocks.at(cursor)) : false),
    Escape: () => (id ? go("/devices") : cursor >= 0 ? move(-1) : false),
  });
  const { known, online } = system.value.devices;
  return html`<div class="split ${id ? "open" : ""}">
    <div class="list">
      <h1 class="title">Devices ${at === null && html`<span class="dim">${number(online)} of ${number(known)} online</span>`}</h1>
      <${List} blocks=${blocks} version=${version} id=${id} cursor=${cursor} select=${select} />
    </div>
    ${id && html`<aside class="detail" aria-label="Device"><${Lazy} load=${detail} id=${id} key=${id} close=${() => go("/devices")} /></aside>`}
  </div>`;
}

function List({ blocks, version, id, cursor, select }) {
  if (blocks.error && !blocks.total) return html`<${Failure} error=${blocks.error} />`;
  if (!blocks.total && !blocks.complete) return html`<${Skeleton} lines="12" />`;
  if (!blocks.total) {
    return html`<${Empty} title=${asOf.value === null ? "No device yet." : "There was no device yet."}>
      ${asOf.value === null && html`<p>${may("devices:write") ? "Register one:" : "With a key that has devices:write:"}</p><pre tabindex="0">curl ${location.origin}/v1/devices -H "Authorization: Bearer $ORDAIN_KEY" \\
  -H 'Content-Type: application/json' -d '{"hardware_id": "door-7", "type": "generic"}'</pre>`}
    <//>`;
  }
  const row = (index) => {
    const found = blocks.at(index);
    return html`<${Row} key=${found?.id ?? index} row=${found} v=${found?.v} index=${index} open=${found !== null && (found.hardware === id || found.id === id)} active=${index === cursor} select=${select} />`;
  };
  return html`<${VirtualList} label="Devices, newest first" columns=${COLUMNS} count=${blocks.total} height=${ROW_PX} above=${blocks.above}
    want=${(first, last) => blocks.want(first, last)} version=${version} row=${row} active=${cursor} />`;
}

function Row({ row, index, open, active, select }) {
  if (row === null) return html`<div class="row waiting" role="row" aria-rowindex=${index + 2}><span role="gridcell">…</span></div>`;
  now.value;
  return html`<div class="row device ${open ? "selected" : ""} ${active ? "active" : ""}" role="row" aria-rowindex=${index + 2} aria-selected=${open} onClick=${() => select(row)}>
    <span role="gridcell"><${Presence} presence=${row.presence} /></span>
    <span role="gridcell" class="cut"><a href=${`/console/devices/${encodeURIComponent(row.hardware)}`} onClick=${(event) => event.preventDefault()}><${Name}>${row.hardware}<//></a></span>
    <span role="gridcell" class="cut"><${Name}>${row.name ?? ""}<//></span>
    <span role="gridcell" class="cut dim">${row.type}</span>
    <span role="gridcell" class="n">${row.seen ? (asOf.value === null ? html`<${Ago} at=${row.seen} />` : html`<${At} at=${row.seen} />`) : ""}</span>
  </div>`;
}
