// Where we are: page, what is selected, filters and time all stand in the address, so that a link shows a
// colleague the same thing.

import { computed, html, signal } from "./html.mjs";

const BASE = "/console";

function read() {
  const [page = "", ...rest] = location.pathname.slice(BASE.length).split("/").filter(Boolean);
  let id = null;
  try {
    id = rest.length ? decodeURIComponent(rest.join("/")) : null;
  } catch {
    id = rest.join("/"); // a broken escape is looked for as it stands
  }
  return { page: page || "now", id, query: new URLSearchParams(location.search) };
}

export const route = signal(read());
addEventListener("popstate", () => (route.value = read()));

/** The moment everything is shown as of: a position or an RFC 3339 time; null is now. */
export const asOf = computed(() => route.value.query.get("at") || null);

/** The address of a page. The moment (`at`) goes along unless it is given; empty values are left out. */
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

/** The same page with some of its query changed. */
export function change(query, options) {
  const { page, id, query: present } = route.value;
  const all = { ...Object.fromEntries(present), ...query };
  go(path(page, id), all, options);
}

export function path(page, id = null) {
  const first = page === "now" ? "/" : `/${page}`;
  return id === null ? first : `${first.replace(/\/$/, "")}/${encodeURIComponent(id)}`;
}

/** A link within the console; with a modifier key the browser does what it always does. */
export function Link({ to, query = {}, children, ...more }) {
  const where = href(to, query);
  const click = (event) => {
    if (event.button || event.metaKey || event.ctrlKey || event.shiftKey || event.altKey) return;
    event.preventDefault();
    go(to, query);
  };
  return html`<a href=${where} onClick=${click} ...${more}>${children}</a>`;
}
