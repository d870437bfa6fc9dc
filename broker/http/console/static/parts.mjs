// Components that all pages use.

import { html, signal, useEffect, useLayoutEffect, useRef, useState } from "./html.mjs";
import { link } from "./api.mjs";
import { clock, moment, now, short, span, utc } from "./format.mjs";

/** A sign for each state. A state is shown with sign, colour and word, so that colour is never needed. */
export const STATES = {
  pending: "◷",
  published: "◐",
  acknowledged: "◑",
  executed: "✓",
  failed: "✕",
  timed_out: "⚠",
  expired: "⊘",
  cancelled: "⊗",
};
export const OPEN_STATES = ["pending", "published", "acknowledged"];

export function Chip({ state }) {
  return html`<span class="chip s-${state}"><span class="sign" aria-hidden="true">${STATES[state] ?? "?"}</span>${state.replace("_", " ")}</span>`;
}

export function Presence({ presence }) {
  const signs = { online: "●", offline: "○", unknown: "◌", never: "–" };
  const words = { never: "never heard" };
  return html`<span class="presence p-${presence}"><span class="sign" aria-hidden="true">${signs[presence]}</span>${words[presence] ?? presence}</span>`;
}

/** A name that a user chose. `bdi` keeps right-to-left text in it from changing the text around it. */
export const Name = ({ children }) => html`<bdi class="name">${children}</bdi>`;

/** A shortened id: the whole id on hover; a click copies it. */
export function Id({ id, whole = false }) {
  const [copied, copy] = useCopy();
  const shown = whole ? id : short(id).length < id.length ? `${id.slice(0, 8)}…${id.slice(-4)}` : id;
  const click = (event) => {
    event.stopPropagation();
    event.preventDefault();
    copy(id);
  };
  return html`<button class="id" type="button" title="${id}: click to copy" onClick=${click}>${copied ? "copied" : shown}</button>`;
}

export function useCopy() {
  const [copied, set] = useState(false);
  const copy = async (text) => {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      // Without HTTPS a page has no clipboard API, so use the old command.
      const area = Object.assign(document.createElement("textarea"), { value: text, className: "offscreen" });
      (document.querySelector("dialog[open]") ?? document.body).append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    set(true);
    setTimeout(() => set(false), 1_500);
  };
  return [copied, copy];
}

export function CopyButton({ text, children = "Copy" }) {
  const [copied, copy] = useCopy();
  return html`<button type="button" onClick=${() => copy(typeof text === "function" ? text() : text)}><span aria-live="polite">${copied ? "Copied" : children}</span></button>`;
}

/** The time since `at`, such as `14 s`; the full time on hover. */
export function Ago({ at }) {
  if (!at) return html`<span class="dim">–</span>`;
  return html`<time dateTime=${new Date(at).toISOString()} title=${moment(at)}>${span(now.value - at)}</time>`;
}

export function At({ at, exact = false }) {
  if (!at) return html`<span class="dim">–</span>`;
  utc.value;
  return html`<time dateTime=${new Date(at).toISOString()} title=${moment(at)}>${exact ? moment(at) : clock(at)}</time>`;
}

export const Skeleton = ({ lines = 3 }) =>
  html`<div class="skeleton" role="status" aria-label="Loading">${Array.from({ length: lines }, (_, index) => html`<span key=${index}></span>`)}</div>`;

export const Empty = ({ title, children }) => html`<div class="empty"><p class="title">${title}</p>${children}</div>`;

/** Shows an error, and a button to try again. */
export function Failure({ error, retry, showing }) {
  if (!error) return null;
  const away = error.status === 0;
  return html`<div class="failure" role="alert">
    <p><strong>${away ? "The broker does not answer." : error.status === 403 ? "This key does not have access." : "This could not be loaded."}</strong> ${" "}
    ${away ? "The console tries again by itself." : error.message}</p>
    ${showing && html`<p>${showing}</p>`}
    ${retry && html`<button type="button" onClick=${retry}>Try again</button>`}
  </div>`;
}

/** Loads data: at first, when `inputs` change, and when `reload` is called. The old data stays until then. */
export function useLoad(load, inputs) {
  const [state, set] = useState({ data: null, error: null });
  const running = useRef(null);
  const again = useRef(false);
  const { up } = link.value;
  const reload = async () => {
    if (running.current) {
      again.current = true;
      return;
    }
    const stop = (running.current = new AbortController());
    try {
      const data = await load(stop.signal);
      if (!stop.signal.aborted) set({ data, error: null });
    } catch (error) {
      if (!stop.signal.aborted) set((before) => ({ data: before.data, error }));
    }
    if (stop.signal.aborted) return;
    running.current = null;
    if (again.current) {
      again.current = false;
      reload();
    }
  };
  useEffect(() => {
    reload();
    return () => {
      running.current?.abort();
      running.current = null;
      again.current = false;
    };
  }, inputs);
  useEffect(() => {
    if (up && state.error) reload(); // the broker is back
  }, [up]);
  return { ...state, reload, loading: state.data === null && state.error === null };
}

/** A list of rows of equal height. Only the visible rows are drawn. `row(index)` returns one. */
export function VirtualList({ count, height, above = 0, want, row, label, columns, version, active = -1 }) {
  const box = useRef(null);
  const [view, look] = useState({ top: 0, size: 600 });
  const seenAbove = useRef(above);
  useLayoutEffect(() => {
    const node = box.current;
    const see = () => look({ top: node.scrollTop, size: node.clientHeight });
    const watch = new ResizeObserver(see);
    watch.observe(node);
    return () => watch.disconnect();
  }, []);
  // Rows added at the top do not move the rows that are being read.
  useLayoutEffect(() => {
    const node = box.current;
    const more = above - seenAbove.current;
    seenAbove.current = above;
    if (more > 0 && node.scrollTop > height / 2) node.scrollTop += more * height;
  }, [above]);
  useLayoutEffect(() => {
    const node = box.current;
    if (active < 0) return;
    const [from, to] = [active * height, (active + 1) * height];
    if (from < node.scrollTop) node.scrollTop = from;
    else if (to > node.scrollTop + node.clientHeight - height) node.scrollTop = to - node.clientHeight + height;
  }, [active]);
  const first = Math.max(0, Math.floor(view.top / height) - 6);
  const last = Math.min(count - 1, Math.ceil((view.top + view.size) / height) + 6);
  useEffect(() => want?.(first, last), [first, last, count, version]);
  const scroll = (event) => {
    const { scrollTop, clientHeight } = event.currentTarget;
    look({ top: scrollTop, size: clientHeight });
  };
  const rows = [];
  for (let index = first; index <= last; index += 1) rows.push(row(index));
  return html`<div class="grid" role="grid" aria-label=${label} aria-rowcount=${count + 1} aria-colcount=${columns.length}>
    <div class="row head" role="row">${columns.map((name) => html`<span role="columnheader" key=${name}>${name}</span>`)}</div>
    <div class="scroll" ref=${box} onScroll=${scroll} tabindex="0" role="rowgroup" aria-label="${label}, rows">
      <div class="space" role="presentation" style=${{ height: `${count * height}px` }}>
        <div role="presentation" class="window" style=${{ transform: `translateY(${first * height}px)` }}>${rows}</div>
      </div>
    </div>
  </div>`;
}

// --- questions before an action ------------------------------------------------------------------

const question = signal(null);

/** Asks the user. Returns true (with `field`: its text) for yes, else false. `what` says what will happen. */
export function ask({ title, what, yes, danger = true, field = null }) {
  return new Promise((answer) => (question.value = { title, what, yes, danger, field, answer }));
}

export function Question() {
  const asked = question.value;
  const dialog = useRef(null);
  const input = useRef(null);
  useEffect(() => {
    if (!asked || dialog.current.open) return;
    dialog.current.showModal();
    // Enter must not do what cannot be undone.
    (input.current ?? dialog.current.querySelector(asked.danger ? "[type=button]" : "[type=submit]")).focus();
  }, [asked]);
  if (!asked) return null;
  const done = (answer) => {
    question.value = null;
    asked.answer(answer);
  };
  const yes = (event) => {
    event.preventDefault();
    done(asked.field ? { text: input.current.value } : true);
  };
  return html`<dialog ref=${dialog} aria-labelledby="question" onClose=${() => done(false)}>
    <form onSubmit=${yes}>
      <h2 id="question">${asked.title}</h2>
      <p>${asked.what}</p>
      ${asked.field && html`<label>${asked.field}<input ref=${input} maxlength="200" /></label>`}
      <div class="actions">
        <button type="button" onClick=${() => done(false)}>Back</button>
        <button type="submit" class=${asked.danger ? "danger" : "primary"}>${asked.yes}</button>
      </div>
    </form>
  </dialog>`;
}

/** Runs `work` once at a time. The state tells whether it runs (`busy`) and how it failed (`error`). */
export function useAction(work) {
  const [state, set] = useState({ busy: false, error: null });
  const run = async (...given) => {
    if (state.busy) return;
    set({ busy: true, error: null });
    try {
      await work(...given);
      set({ busy: false, error: null });
    } catch (error) {
      set({ busy: false, error });
    }
  };
  return [run, state];
}

export function Table({ label, head, rows, numbers = [] }) {
  return html`<div class="table" tabindex="0" role="region" aria-label=${label}><table>
    <thead><tr>${head.map((name, place) => html`<th scope="col" key=${place} class=${numbers.includes(place) ? "n" : ""}>${name}</th>`)}</tr></thead>
    <tbody>${rows.map((cells, line) => html`<tr key=${line}>${cells.map((cell, place) => html`<td key=${place} class=${numbers.includes(place) ? "n" : ""}>${cell}</td>`)}</tr>`)}</tbody>
  </table></div>`;
}

export function Section({ title, children, aside }) {
  return html`<section><header><h2>${title}</h2>${aside}</header>${children}</section>`;
}

/** A component whose module is loaded at its first use. */
export function Lazy({ load, ...more }) {
  const [Part, set] = useState(null);
  const [error, fail] = useState(null);
  useEffect(() => {
    load().then((part) => set(() => part), fail);
  }, [load]);
  if (error) return html`<${Failure} error=${error} retry=${() => location.reload()} />`;
  return Part ? html`<${Part} ...${more} />` : html`<${Skeleton} lines="6" />`;
}
