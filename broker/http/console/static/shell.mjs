// The frame of every page: sign-in, header, search, keyboard shortcuts, and the banner when the broker is away.

import { all, apiKey, encoded, get, link, readSystem, signIn, signOut, signedOut, system } from "./api.mjs";
import { clock, setUtc, utc } from "./format.mjs";
import { html, signal, useEffect, useRef, useState } from "./html.mjs";
import { HELP, setShortcuts, shortcuts, useKeys } from "./keys.mjs";
import { start, stream } from "./live.mjs";
import { Now } from "./now.mjs";
import { Failure, Lazy, Question, Skeleton } from "./parts.mjs";
import { Link, asOf, change, go, route } from "./route.mjs";

const PAGES = [
  ["now", "/", "Now"],
  ["devices", "/devices", "Devices"],
  ["time", "/time", "Time"],
  ["system", "/system", "System"],
];
const LAZY = {
  devices: () => import("./devices.mjs").then((module) => module.Devices),
  time: () => import("./time.mjs").then((module) => module.Time),
  system: () => import("./system.mjs").then((module) => module.System),
  bar: () => import("./time.mjs").then((module) => module.TimeBar),
};

export function Shell() {
  const [error, fail] = useState(null);
  const key = apiKey.value;
  const known = system.value !== null;
  useEffect(() => {
    fail(null);
    if (key && !known) readSystem().catch(fail);
  }, [key, known, link.value.up]);
  useEffect(() => {
    if (!key || known || !error || error.status !== 0) return;
    const again = setTimeout(() => readSystem().catch(fail), 2_000);
    return () => clearTimeout(again);
  }, [key, known, error]);
  if (!key) return html`<${SignIn} />`;
  if (!known) {
    return html`<main class="alone">${error ? html`<${Failure} error=${error} /><button type="button" onClick=${() => signOut()}>Use another key</button>` : html`<${Skeleton} lines="4" />`}</main>`;
  }
  return html`<${Console} />`;
}

function SignIn() {
  const input = useRef(null);
  const [state, set] = useState({ busy: false, error: null });
  useEffect(() => input.current.focus(), []);
  const submit = async (event) => {
    event.preventDefault();
    const given = input.current.value.trim();
    if (!/^[!-~]+$/.test(given)) {
      set({ busy: false, error: { message: "A key has the form sk_live_… without spaces." } });
      return;
    }
    set({ busy: true, error: null });
    try {
      await readSystem(given);
      signIn(given);
    } catch (error) {
      set({ busy: false, error });
    }
  };
  const told = {
    401: "This key is unknown or revoked.",
    403: "The console needs a key with the scope devices:read. This key does not have it.",
    0: "The broker does not answer. Is it running?",
  };
  return html`<main class="alone">
    <h1><span class="brand">Ordain</span> console</h1>
    <form class="signin" onSubmit=${submit}>
      <label for="key">API key</label>
      <input id="key" ref=${input} type="password" autocomplete="off" spellcheck="false" required />
      <button type="submit" class="primary" disabled=${state.busy}>Sign in</button>
      ${(state.error || signedOut.value) && html`<p class="wrong" role="alert">${state.error ? (told[state.error.status] ?? state.error.message) : signedOut.value}</p>`}
    </form>
    <p>The key stays in this tab until you close the tab. To create a key:</p>
    <pre tabindex="0">ordain keys create --project default --scope devices:read \\
  --scope devices:write --scope events:read</pre>
    <p>The console uses only the public <a href="/docs">API</a>.</p>
  </main>`;
}

const helping = signal(false);

function Console() {
  const { page } = route.value;
  const { position } = system.peek();
  const travelling = asOf.value !== null;
  useEffect(() => (travelling ? undefined : start(system.peek().position)), [travelling, apiKey.value]);
  useKeys({
    "/": () => document.getElementById("search").focus(),
    "?": () => (helping.value = true),
    "g n": () => go("/"),
    "g d": () => go("/devices"),
    "g t": () => go("/time"),
    "g s": () => go("/system"),
    t: () => go("/time"),
    Escape: () => {
      if (document.activeElement?.closest("input, textarea, select")) document.activeElement.blur();
      else if (asOf.peek() !== null) change({ at: null });
      else return false;
    },
  });
  useEffect(() => {
    document.title = `${PAGES.find(([name]) => name === page)?.[2] ?? "Command"} · Ordain`;
  }, [page]);
  const shown = page === "now" || page === "commands" ? html`<${Now} key=${asOf.value === null} />` : LAZY[page] ? html`<${Lazy} key=${page} load=${LAZY[page]} />` : html`<${Nowhere} />`;
  return html`<a class="skip" href="#main">Skip to the page</a>
    <${Header} page=${page} />
    <${Banner} />
    ${(travelling || page === "time") && html`<${Lazy} load=${LAZY.bar} />`}
    <main id="main" class="page-${page}" tabindex="-1">${shown}</main>
    <${Question} />
    ${helping.value && html`<${Help} />`}
    <span class="offscreen" data-position=${position}></span>`;
}

const Nowhere = () => html`<div class="empty"><p class="title">Page not found.</p><p><${Link} to="/">Go to Now<//></p></div>`;

function Header({ page }) {
  const { caller } = system.value;
  return html`<header class="top">
    <${Link} to="/" class="brand" aria-label="Ordain, now">Ordain<//>
    <nav aria-label="Pages">${PAGES.map(([name, to, title]) => html`<${Link} key=${name} to=${to} aria-current=${name === page || (name === "now" && page === "commands") ? "page" : null}>${title}<//>`)}</nav>
    <span class="project" title="Project of this key">${caller?.project ?? "all projects"}</span>
    <${Search} />
    <${Live} />
    <${Menu} />
  </header>`;
}

function Live() {
  if (asOf.value !== null) return html`<span class="live past">◆ history</span>`;
  const { up } = link.value;
  const words = { live: ["●", "live"], polling: ["◐", "updated every 2 s"], broken: ["○", "reconnecting"], off: ["○", "connecting"] };
  const [sign, word] = up ? words[stream.value] : ["✕", "offline"];
  const why = stream.value === "polling" ? "This key does not have the scope events:read, so the lists are reloaded every 2 seconds." : null;
  return html`<span class="live ${up ? stream.value : "away"}" role="status" title=${why}><span aria-hidden="true">${sign}</span> ${word}</span>`;
}

function Banner() {
  const { up, since, error } = link.value;
  if (up && stream.value !== "broken") return null;
  return html`<div class="banner" role="alert"><strong>${since ? `The broker has not answered since ${clock(since)}.` : "The broker does not answer."}</strong>${" "}
    You see the last known state. The console reconnects by itself and then shows what happened in between. ${error && html`<span class="dim">(${error})</span>`}</div>`;
}

function Menu() {
  const [theme, set] = useState(document.documentElement.dataset.theme ?? "");
  const choose = (value) => {
    if (value) document.documentElement.dataset.theme = value;
    else delete document.documentElement.dataset.theme;
    localStorage.setItem("ordain.theme", value);
    set(value);
  };
  return html`<details class="menu" onKeyDown=${(event) => event.key === "Escape" && (event.currentTarget.open = false)}>
    <summary aria-label="Settings">⋯</summary>
    <div class="sheet">
      <label>Colours <select value=${theme} onChange=${(event) => choose(event.target.value)}>
        <option value="">as the system</option><option value="light">light</option><option value="dark">dark</option>
      </select></label>
      <label><input type="checkbox" checked=${utc.value} onChange=${(event) => setUtc(event.target.checked)} /> Times in UTC</label>
      <button type="button" onClick=${() => (helping.value = true)}>Keyboard</button>
      <a href="/docs">API</a>
      <button type="button" onClick=${() => signOut()}>Sign out</button>
    </div>
  </details>`;
}

function Help() {
  const dialog = useRef(null);
  useEffect(() => {
    dialog.current.showModal();
    dialog.current.querySelector(".primary").focus();
  }, []);
  return html`<dialog ref=${dialog} aria-labelledby="help" onClose=${() => (helping.value = false)}>
    <h2 id="help">Keyboard</h2>
    <dl class="keys">${HELP.map(([keys, what]) => html`<div key=${keys}><dt>${keys.split(" ").map((key) => html`<kbd key=${key}>${key}</kbd>`)}</dt><dd>${what}</dd></div>`)}</dl>
    <label><input type="checkbox" checked=${shortcuts.value} onChange=${(event) => setShortcuts(event.target.checked)} /> Keyboard shortcuts on</label>
    <form method="dialog" class="actions"><button class="primary">Close</button></form>
  </dialog>`;
}

// --- search ----------------------------------------------------------------------------------------

const MOST_DEVICES = 1_000;
const DEVICES_KEPT_MS = 30_000;
let devices = null;
/** The newest devices, for a search by parts of names. Kept for `DEVICES_KEPT_MS`. */
function knownDevices(at) {
  const key = `${apiKey.peek()} ${at}`;
  if (devices?.key !== key || devices.until < Date.now()) {
    const list = all("/v1/devices", { limit: 100, as_of: at }, MOST_DEVICES);
    list.catch(() => (devices = null));
    devices = { key, list, until: Date.now() + DEVICES_KEPT_MS };
  }
  return devices.list;
}

/** The command or device with this id or name, and devices whose names contain the text. */
async function search(text, stop) {
  const exact = /^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$/.test(text);
  const at = asOf.peek();
  const one = (path) =>
    get(path, { as_of: at }, stop).catch((error) => {
      if (error.status === 404 || error.status === 400) return null;
      throw error;
    });
  const [command, page] = await Promise.all([exact && text.startsWith("cmd_") ? one(`/v1/commands/${text}`) : null, knownDevices(at)]);
  const listed = page.data.find((each) => each.id === text || each.hardware_id === text);
  const device = listed ?? (exact && page.more ? await one(`/v1/devices/${text}`) : null);
  const low = text.toLowerCase();
  const near = page.data.filter((each) => each.id !== device?.id && [each.hardware_id, each.name ?? "", each.id].some((name) => name.toLowerCase().includes(low)));
  return [
    ...(command ? [{ to: `/commands/${command.id}`, title: `${command.type} to ${command.hardware_id}`, kind: "command" }] : []),
    ...(device ? [device, ...near] : near).slice(0, 8).map((each) => ({ to: `/devices/${encoded(each.hardware_id)}`, title: each.name ? `${each.hardware_id}, ${each.name}` : each.hardware_id, kind: "device" })),
    ...(exact ? [{ to: "/", query: { type: text }, title: `commands named ${text}`, kind: "filter" }] : []),
  ];
}

function Search() {
  const [text, write] = useState("");
  const [found, set] = useState(null);
  const [active, move] = useState(0);
  const entered = useRef(null); // the text for which Enter came before the answer: its first entry is opened then
  const open = (one) => {
    if (!one) return;
    write("");
    document.activeElement?.blur();
    go(one.to, one.query);
  };
  useEffect(() => {
    if (!text.trim()) {
      set(null);
      return;
    }
    const stop = new AbortController();
    const show = (list) => {
      if (stop.signal.aborted) return;
      set({ of: text, list });
      move(0);
    };
    const later = setTimeout(() => search(text.trim(), stop.signal).then(show, (error) => stop.signal.aborted || set({ of: text, list: [], error })), 120);
    return () => (clearTimeout(later), stop.abort());
  }, [text]);
  useEffect(() => {
    if (found && found.of === entered.current) open(found.list[0]);
  }, [found]);
  const list = found?.list ?? [];
  const shown = found !== null;
  const key = (event) => {
    const { value } = event.target; // `text` is older until the next frame
    if (!value.trim()) return;
    if (event.key === "ArrowDown") move(Math.max(0, Math.min(active + 1, list.length - 1)));
    else if (event.key === "ArrowUp") move(Math.max(active - 1, 0));
    else if (event.key === "Enter" && found?.of === value) open(list[active]);
    else if (event.key === "Enter") entered.current = value;
    else if (event.key === "Escape") write("");
    else return;
    event.preventDefault();
  };
  return html`<div class="search" role="search">
    <input id="search" type="search" placeholder="/ search" aria-label="Search by id, device or name" autocomplete="off" spellcheck="false"
      role="combobox" aria-expanded=${shown} aria-controls="found" aria-activedescendant=${list.length ? `found-${active}` : null}
      value=${text} onInput=${(event) => ((entered.current = null), write(event.target.value))} onKeyDown=${key} />
    ${shown && html`<ul id="found" role="listbox" aria-label="Found">
      ${list.map((one, index) => html`<li key=${one.to + one.kind} id="found-${index}" role="option" aria-selected=${index === active} onMouseDown=${(event) => (event.preventDefault(), open(one))}><bdi>${one.title}</bdi> <span class="dim">${one.kind}</span></li>`)}
      ${!list.length && html`<li role="option" aria-selected="false" class="dim">${found.error ? found.error.message : "Not found. Parts of names are searched in the newest 1,000 devices."}</li>`}
    </ul>`}
  </div>`;
}

