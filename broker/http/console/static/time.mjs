// The bar that moves all pages to an earlier position of the log, and the page Time: failures and changes.

import { all, encoded, get, may, readSystem, system } from "./api.mjs";
import { clock, moment, number, utc } from "./format.mjs";
import { html, useEffect, useRef, useState } from "./html.mjs";
import { useKeys } from "./keys.mjs";
import { Chip, Empty, Failure, Name, Presence, Section, Skeleton, Table, useLoad } from "./parts.mjs";
import { eventAfter, positionAt, timeOf } from "./past.mjs";
import { Link, asOf, change } from "./route.mjs";

const SPEEDS = [1, 2, 5, 10, 50, 100, 1_000];
const TICK_MS = 250;
const IDLE_MS = 2_000; // the player waits at most so long (real time) for the next event, then jumps to it
const PAGE = 200;
const DAY_MS = 86_400_000;
const SHOWN_WRONG = 30;
const MOST_CHANGES = 1_000;
const isPosition = (text) => /^[0-9]+$/.test(text ?? "");

/** The chosen time as {position, time}. Null while it is computed, and always without events:read. */
function usePlace(at) {
  const { data } = useLoad(
    async (stop) => {
      if (!may("events:read")) return null;
      if (at === null) return { position: system.peek().position, time: null };
      if (isPosition(at)) return { position: Number(at), time: await timeOf(Number(at), stop) };
      return { position: await positionAt(Date.parse(at), stop), time: Date.parse(at) };
    },
    [at],
  );
  return data;
}

export function TimeBar() {
  const at = asOf.value;
  const place = usePlace(at);
  const [player, play] = useState(null); // {way: 1 or -1, speed}
  const [speed, choose] = useState(10);
  const [span, zoom] = useState(0);
  const head = system.value.position;
  utc.value;
  const jump = (position) => change({ at: String(Math.max(1, Math.min(head, Math.round(position)))) }, { replace: at !== null });
  const position = place?.position ?? head;
  const low = span ? Math.max(1, Math.min(head - span, position - Math.round(span / 2))) : 1;
  const high = span ? Math.min(head, low + span) : head;
  const step = async (by) => {
    play(null);
    if (by < 0) return jump(position - 1);
    const event = await eventAfter(position);
    return event && jump(Number(event.id));
  };
  usePlayer(player, place, jump, () => play(null));
  useEffect(() => {
    if (at === null) play(null);
    else readSystem().catch(() => null);
  }, [at === null]);
  useKeys({ ",": () => void step(-1), ".": () => void step(1), " ": () => (at === null ? false : play(player ? null : { way: 1, speed })) });
  const stopped = player === null;
  return html`<div class="timebar ${at === null ? "" : "past"}" role="region" aria-label="Time">
    <p class="then">${at === null ? html`<strong>Now.</strong> <span class="dim">Move the slider or type a time to see every page as it was then.</span>` : html`<strong>As it was ${place?.time ? `at ${moment(place.time)}` : isPosition(at) ? "" : at}</strong> <span class="dim">after position ${number(place?.position ?? Number(at))} of ${number(head)}; read-only</span>`}
      ${at !== null && html`<button type="button" class="primary" onClick=${() => change({ at: null })}>Back to now <kbd>Esc</kbd></button>`}</p>
    ${may("events:read") && html`<div class="controls">
      <button type="button" aria-label="Play backward" aria-pressed=${player?.way === -1} disabled=${at === null} onClick=${() => play(player?.way === -1 ? null : { way: -1, speed })}>◀◀</button>
      <button type="button" aria-label="One event back" onClick=${() => step(-1)}>◀</button>
      <button type="button" aria-label=${stopped ? "Play forward" : "Stop"} disabled=${at === null} onClick=${() => play(stopped ? { way: 1, speed } : null)}>${stopped ? "▶▶" : "■"}</button>
      <button type="button" aria-label="One event on" disabled=${at === null} onClick=${() => step(1)}>▶</button>
      <label class="offscreen" for="speed">Speed</label>
      <select id="speed" value=${speed} onChange=${(event) => (choose(Number(event.target.value)), player && play({ ...player, speed: Number(event.target.value) }))}>${SPEEDS.map((each) => html`<option key=${each} value=${each}>×${each}</option>`)}</select>
      <input class="slider" type="range" aria-label="Position in the log" min=${low} max=${Math.max(low + 1, high)} value=${position} onInput=${(event) => (play(null), jump(Number(event.target.value)))} aria-valuetext=${place?.time ? moment(place.time) : `position ${position}`} />
      <label class="offscreen" for="span">Width of the slider</label>
      <select id="span" value=${span} onChange=${(event) => zoom(Number(event.target.value))}><option value="0">whole log</option><option value="10000">10,000 events</option><option value="1000">1,000 events</option><option value="100">100 events</option></select>
    </div>`}
    <${TypeTime} at=${at} />
  </div>`;
}

/** The field for a typed time, in the time zone that the console shows. */
function TypeTime({ at }) {
  const [wrong, say] = useState("");
  const submit = (event) => {
    event.preventDefault();
    const text = event.currentTarget.elements.moment.value.trim();
    const parsed = isPosition(text) ? text : toTime(text);
    say(parsed === null ? "Enter a time such as 12:00:03 or 2026-11-20 12:00:03, or a position." : "");
    if (parsed !== null) change({ at: parsed });
  };
  return html`<form class="typetime" onSubmit=${submit}>
    <label for="moment">Go to</label><input id="moment" name="moment" placeholder="12:00:03 or a position" autocomplete="off" defaultValue="" />
    <button type="submit">Go</button>${wrong && html`<span class="wrong" role="alert">${wrong}</span>`}
  </form>`;
}

/** A typed time as RFC 3339; null if it is not a time. Without a date: the last time that the clock showed it. */
export function toTime(text) {
  const found = /^(?:(\d{4})-(\d\d)-(\d\d)[T ])?(\d\d):(\d\d)(?::(\d\d(?:\.\d{1,3})?))?(Z|[+-]\d\d:\d\d)?$/.exec(text);
  if (!found) return null;
  const [, year, month, date, hour, minute, second = "00", zone] = found;
  const two = (value) => String(value).padStart(2, "0");
  const today = new Date();
  const days = utc.peek() ? [today.getUTCFullYear(), today.getUTCMonth() + 1, today.getUTCDate()] : [today.getFullYear(), today.getMonth() + 1, today.getDate()];
  const day = year ? `${year}-${month}-${date}` : `${days[0]}-${two(days[1])}-${two(days[2])}`;
  let at = new Date(`${day}T${hour}:${minute}:${second.padEnd(2, "0")}${zone ?? (utc.peek() ? "Z" : "")}`);
  if (Number.isNaN(at.getTime())) return null;
  if (!year && at > today) at = new Date(at.getTime() - DAY_MS);
  return at.toISOString();
}

/** Plays the log: goes from event to event, `speed` times as fast as they happened. */
function usePlayer(player, place, jump, stop) {
  const here = useRef(place);
  here.current = place ?? here.current;
  useEffect(() => {
    if (!player || !here.current) return undefined;
    const { way, speed } = player;
    let { position, time } = here.current;
    let ahead = []; // [position, time] of the next events, in the order of play
    let busy = false;
    let waited = 0;
    const fill = async () => {
      const after = way > 0 ? position : Math.max(0, position - PAGE - 1);
      const page = await get("/v1/events", { after, limit: PAGE });
      const found = page.data.map((each) => [Number(each.id), Date.parse(each.time)]).filter(([id]) => (way > 0 ? id > position : id < position));
      ahead = way > 0 ? found : found.reverse();
    };
    const tick = async () => {
      if (busy) return;
      busy = true;
      try {
        if (!ahead.length) await fill();
        if (!ahead.length) return stop();
        time += way * speed * TICK_MS;
        waited += TICK_MS;
        if (waited >= IDLE_MS) time = ahead[0][1];
        let reached = null;
        while (ahead.length && way * (time - ahead[0][1]) >= 0) reached = ahead.shift();
        if (reached !== null) {
          [position] = reached;
          waited = 0;
          jump(position);
        }
      } catch {
        stop();
      } finally {
        busy = false;
      }
      return undefined;
    };
    const timer = setInterval(tick, TICK_MS);
    return () => clearInterval(timer);
  }, [player?.way, player?.speed]);
}

// --- the page --------------------------------------------------------------------------------------

export function Time() {
  return html`<div class="columns">
    <h1 class="offscreen">Time</h1>
    <${WentWrong} />
    <${Diff} />
  </div>`;
}

/** The newest failures, each with a button that goes to its time. */
function WentWrong() {
  const { data, error } = useLoad(async (stop) => {
    if (!may("events:read")) return null;
    const after = await positionAt(Date.now() - DAY_MS, stop);
    const kinds = await Promise.all(["failed", "timed_out", "expired"].map((event) => all("/v1/events", { event, after, limit: 1_000 }, 5_000, stop)));
    return kinds.flatMap((kind) => kind.data).sort((one, other) => Number(other.id) - Number(one.id)).slice(0, SHOWN_WRONG);
  }, []);
  if (!may("events:read")) return html`<${Section} title="Time"><p>The slider needs a key with the scope events:read. You can still type a time.</p><//>`;
  return html`<${Section} title="Failures" aside=${html`<span class="dim">last 24 hours, newest first</span>`}>
    ${error && html`<${Failure} error=${error} />`}
    ${!data && !error && html`<${Skeleton} />`}
    ${data && !data.length && html`<${Empty} title="No failures in the last 24 hours." />`}
    ${data?.length > 0 && html`<${Table} label="Failures" head=${["When", "What", "Command", "Device", ""]} rows=${data.map((event) => {
      const at = Date.parse(event.time);
      return [html`<time title=${moment(at)}>${clock(at)}</time>`, html`<${Chip} state=${event.type.split(".")[2]} />`, html`<${Link} to=${`/commands/${event.subject}`}><${Name}>${event.data.type ?? event.subject}<//><//>`, html`<${Link} to=${`/devices/${encoded(event.data.hardware_id)}`}><${Name}>${event.data.hardware_id}<//><//>`, html`<button type="button" onClick=${() => change({ at: event.id })}>Go there</button>`];
    })} />`}
  <//>`;
}

function Diff() {
  const at = asOf.value;
  const [points, set] = useState({ from: "", to: "" });
  const [asked, compare] = useState(null);
  const point = (text) => (text.trim() === "" || isPosition(text.trim()) ? text.trim() : toTime(text.trim()));
  const submit = (event) => {
    event.preventDefault();
    compare({ from: point(points.from), to: point(points.to) });
  };
  const field = (name, title, hint) => html`<div class="moment"><label><span>${title}</span><input value=${points[name]} placeholder=${hint} onInput=${(event) => set({ ...points, [name]: event.target.value })} /></label>
    <button type="button" disabled=${at === null} onClick=${() => set({ ...points, [name]: at })}>this moment</button></div>`;
  return html`<${Section} title="Compare two moments">
    <form class="diff" onSubmit=${submit}>${field("from", "From", "the beginning")} ${field("to", "To", "now")} <button type="submit" class="primary">Compare</button></form>
    ${asked && (asked.from === null || asked.to === null ? html`<p class="wrong" role="alert">Enter a position, or a time such as 2026-11-20 12:00:03.</p>` : html`<${Changes} key=${`${asked.from} ${asked.to}`} from=${asked.from} to=${asked.to} />`)}
  <//>`;
}

function Changes({ from, to }) {
  const { data, error } = useLoad((stop) => all("/v1/diff", { from, to, limit: 100 }, MOST_CHANGES, stop), [from, to]);
  if (error) return html`<${Failure} error=${error} />`;
  if (!data) return html`<${Skeleton} />`;
  const isNew = (each) => each.before === null;
  const gone = data.data.filter((each) => each.kind === "device" && each.after.deleted_at);
  const fresh = data.data.filter((each) => isNew(each) && !gone.includes(each));
  const changed = data.data.filter((each) => !isNew(each) && !gone.includes(each));
  const lists = [["New", fresh], ["Changed", changed], ["Gone", gone]];
  return html`${data.more && html`<p class="dim">Only the first ${number(MOST_CHANGES)} changes are shown. Choose a shorter time.</p>`}
    ${lists.map(([title, list]) => html`<h3 key=${title}>${title} <span class="dim">${number(list.length)}</span></h3><ul class="changes">${list.map((each) => html`<${Change} key=${each.id} change=${each} />`)}</ul>`)}`;
}

function Change({ change: { kind, id, before, after } }) {
  if (kind === "device") {
    return html`<li><${Link} to=${`/devices/${encoded(after.hardware_id)}`}><${Name}>${after.hardware_id}<//><//> ${before && html`<${Presence} presence=${before.presence} /> → `}<${Presence} presence=${after.presence} /></li>`;
  }
  return html`<li><${Link} to=${`/commands/${id}`}><${Name}>${after.type}<//><//> <span class="dim">to <${Name}>${after.hardware_id}<//></span> ${before && html`<${Chip} state=${before.state} /> → `}<${Chip} state=${after.state} /></li>`;
}
