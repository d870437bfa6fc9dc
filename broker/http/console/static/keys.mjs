// Keyboard shortcuts. Each page registers its keys. Single-letter shortcuts can be switched off: people who use
// speech input may trigger them by accident (WCAG 2.1.4).

import { signal, useEffect, useRef } from "./html.mjs";

const KEPT = "ordain.shortcuts";
export const shortcuts = signal(localStorage.getItem(KEPT) !== "0");
export function setShortcuts(on) {
  localStorage.setItem(KEPT, on ? "1" : "0");
  shortcuts.value = on;
}

export const HELP = [
  ["/", "search by id, device or name"],
  ["j k", "next, previous in the list"],
  ["Enter", "open what is selected"],
  ["c", "cancel the command that is open"],
  ["r", "retry the command that is open"],
  ["t", "show the open command at its time, or open Time"],
  ["g n", "Now"],
  ["g d", "Devices"],
  ["g t", "Time"],
  ["g s", "System"],
  ["p", "pause or resume the list"],
  ["Esc", "close, or back to now"],
  ["?", "this list"],
];

const layers = [];
let prefix = "";
let prefixTimer;

addEventListener("keydown", (event) => {
  const { target, key } = event;
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  if (document.querySelector("dialog[open]")) return;
  const writing = target.closest?.("input, textarea, select, [contenteditable]");
  if (writing && key !== "Escape") return;
  if (key === "Enter" && target.closest?.("a, button, summary")) return;
  if (key.length === 1 && !shortcuts.peek()) return;
  const pressed = prefix + key;
  clearTimeout(prefixTimer);
  prefix = "";
  if (pressed === "g") {
    prefix = "g ";
    prefixTimer = setTimeout(() => (prefix = ""), 1_000);
    return;
  }
  for (const layer of [...layers].reverse()) {
    const work = layer.current[pressed];
    if (work && work(event) !== false) {
      event.preventDefault();
      return;
    }
  }
});

/**
 * Registers the keys of a component while it is shown. The component that was added last is asked first. A
 * function that returns `false` leaves the key to the others.
 */
export function useKeys(map) {
  const layer = useRef(map);
  layer.current = map;
  useEffect(() => {
    layers.push(layer);
    return () => layers.splice(layers.indexOf(layer), 1);
  }, []);
}
