// The address of the page. It holds the page, the selection, the filters and the time, so that a link shows
// other people the same.

import { computed, html, signal } from "./html.mjs";

const BASE = "/console";

function read() {
  const [page = "", ...rest] = location.pathname.slice(BASE.length).split("/").filter(Boolean);
  let id = null;
  try {
    id = rest.length ? decodeURIComponent(rest.join("/")) : null;
  } catch {
    id = rest.join("/"); // a wrong percent-encoding: use the text as it is
  }
  return { page: page || "now", id, query: new URLSearchParams(location.search) };
}

export const route = signal(read());
addEventListener("popstate", () => (route.value = read()));

/** The time that the pages show: a position or an RFC 3339 time; null is now. */
export const asOf = computed(() => route.value.query.get("at") || null);

/** The address of a page. It keeps `at` unless `query` has one. Empty values are left out. */
export function href(path, query = {}) {
  const at = route.value.query.get("at");
  const all = new URLSearchParams(at ? { at } : {});
  for (const [name, value] of Object.entries(query)) {
    if (value === null || value === undefined || value === "") all.delete(name);
    else all.set(name, value);
  }
  const search = all.toString();
  return `${BASE}${path === "/" ? "" : path}${search && `?${search}`}`;
}

export function go(path, query = {}, { replace = false } = {}) {
  const where = href(path, query);
  if (where === location.pathname + location.search) return;
  history[replace ? "replaceState" : "pushState"](null, "", where);
  route.value = read();
}

/** Goes to the same page with some parts of the query changed. */
export function change(query, options) {
  const { page, id, query: present } = route.value;
  const all = { ...Object.fromEntries(present), ...query };
  go(path(page, id), all, options);
}

export function path(page, id = null) {
  const first = page === "now" ? "/" : `/${page}`;
  return id === null ? first : `${first.replace(/\/$/, "")}/${encodeURIComponent(id)}`;
}

/** A link within the console. With a modifier key (new tab, new window) the browser handles the click. */
export function Link({ to, query = {}, children, ...more }) {
  const where = href(to, query);
  const click = (event) => {
    if (event.button || event.metaKey || event.ctrlKey || event.shiftKey || event.altKey) return;
    event.preventDefault();
    go(to, query);
  };
  return html`<a href=${where} onClick=${click} ...${more}>${children}</a>`;
}
