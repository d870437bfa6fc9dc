// Starts the console: signs in with the key of this tab, or asks for a key.

import "./theme.mjs";
import { html, render } from "./html.mjs";
import { Shell } from "./shell.mjs";

const app = document.getElementById("app");
app.replaceChildren(); // index.html has a line there for when this file does not arrive
render(html`<${Shell} />`, app);
