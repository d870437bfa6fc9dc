// Times, numbers and names as people read them.

import { computed, signal } from "./html.mjs";

/** Broker clock minus this machine's clock, ms. */
export const skew = signal(0);
const ticking = signal(Date.now());
setInterval(() => (ticking.value = Date.now()), 1_000);
/** The broker's time in ms. It changes once a second. */
export const now = computed(() => ticking.value + skew.value);
export const nowExactly = () => Date.now() + skew.peek();

export const utc = signal(localStorage.getItem("ordain.utc") === "1");
export function setUtc(value) {
  localStorage.setItem("ordain.utc", value ? "1" : "0");
  utc.value = value;
}

/** `14 s`, `3 min`, `2 h`, `5 d`. */
export function span(ms) {
  const sec = Math.max(0, Math.round(ms / 1_000));
  if (sec < 100) return `${sec} s`;
  if (sec < 6_000) return `${Math.round(sec / 60)} min`;
  if (sec < 172_800) return `${Math.round(sec / 3_600)} h`;
  return `${Math.round(sec / 86_400)} d`;
}

/** A measured duration: `4 ms`, `240 ms`, `1.25 s`, `2 min 5 s`. */
export function length(ms) {
  if (ms === null || ms === undefined) return "–";
  if (ms < 1_000) return `${Math.round(ms)} ms`;
  if (ms < 10_000) return `${(ms / 1_000).toFixed(2)} s`;
  if (ms < 60_000) return `${(ms / 1_000).toFixed(1)} s`;
  if (ms < 3_600_000) return `${Math.floor(ms / 60_000)} min ${Math.round((ms % 60_000) / 1_000)} s`;
  if (ms < 172_800_000) return `${Math.floor(ms / 3_600_000)} h ${Math.round((ms % 3_600_000) / 60_000)} min`;
  return `${Math.floor(ms / 86_400_000)} d ${Math.round((ms % 86_400_000) / 3_600_000)} h`;
}

const two = (number) => String(number).padStart(2, "0");

function parts(ms) {
  const at = new Date(ms);
  return utc.value
    ? { y: at.getUTCFullYear(), mo: at.getUTCMonth() + 1, d: at.getUTCDate(), h: at.getUTCHours(), mi: at.getUTCMinutes(), s: at.getUTCSeconds(), zone: "UTC" }
    : { y: at.getFullYear(), mo: at.getMonth() + 1, d: at.getDate(), h: at.getHours(), mi: at.getMinutes(), s: at.getSeconds(), zone: zone(at) };
}

function zone(at) {
  const minutes = -at.getTimezoneOffset();
  if (minutes === 0) return "UTC";
  const far = Math.abs(minutes);
  return `UTC${minutes < 0 ? "−" : "+"}${two(Math.floor(far / 60))}:${two(far % 60)}`;
}

/** `12:00:03`. */
export function clock(ms) {
  const { h, mi, s } = parts(ms);
  return `${two(h)}:${two(mi)}:${two(s)}`;
}

/** `12:00:03.250`. */
export const clockExactly = (ms) => `${clock(ms)}.${String(((ms % 1_000) + 1_000) % 1_000).padStart(3, "0")}`;

/** `2026-11-20 12:00:03.250 UTC`. */
export function moment(ms) {
  const { y, mo, d, zone: name } = parts(ms);
  return `${y}-${two(mo)}-${two(d)} ${clockExactly(ms)} ${name}`;
}

export const day = (ms) => ((at) => `${at.y}-${two(at.mo)}-${two(at.d)}`)(parts(ms));

const grouped = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
export const number = (value) => (value === null || value === undefined ? "–" : grouped.format(value));

export function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let step = 0;
  while (value >= 1_000 && step < units.length - 1) [value, step] = [value / 1_000, step + 1];
  return `${value < 10 && step ? value.toFixed(1) : Math.round(value)} ${units[step]}`;
}

export const short = (id) => (id.length > 13 ? `${id.slice(0, 12)}…` : id);

// C0 except tab and line feed, DEL and C1, and characters that change the direction of the text after them.
const CONTROL = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200e\u200f\u202a-\u202e\u2066-\u2069]/g;
/** A text with such characters escaped as in JSON, so that what others wrote cannot change how our words look. */
export const visible = (text) => text.replace(CONTROL, (one) => `\\u${one.charCodeAt(0).toString(16).padStart(4, "0")}`);
export const pretty = (value) => visible(JSON.stringify(value, null, 2));

/** A percentile of sorted numbers; null if there are none. */
export function percentile(sorted, share) {
  if (!sorted.length) return null;
  return sorted[Math.min(sorted.length - 1, Math.ceil(sorted.length * share) - 1)];
}
