// Starts the console: signs in with the key of this tab, or asks for a key.

import "./theme.mjs";
import { html, render } from "./html.mjs";
import { Shell } from "./shell.mjs";

render(html`<${Shell} />`, document.getElementById("app"));
