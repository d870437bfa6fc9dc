// Imports the vendored libraries. All other modules import them from here.

import { Fragment, createRef, h, render } from "./vendor/preact.mjs";
import { useEffect, useLayoutEffect, useMemo, useRef, useState } from "./vendor/hooks.mjs";
import { batch, computed, effect, signal, untracked } from "./vendor/signals.mjs";
import htm from "./vendor/htm.mjs";

export const html = htm.bind(h);
export { Fragment, createRef, render };
export { useEffect, useLayoutEffect, useMemo, useRef, useState };
export { batch, computed, effect, signal, untracked };
