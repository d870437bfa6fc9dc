// Code that sends a command again: curl, `ordain send`, Python, JavaScript. Names and parameters are quoted as
// each language needs, so that no value can become code.

export const shell = (text) => (/^[A-Za-z0-9_./:=@%+-]+$/.test(text) ? text : `'${text.replaceAll("'", `'\\''`)}'`);

/** A JSON value as a Python literal. Only null, true and false differ. */
export function python(value, indent = "") {
  const deeper = `${indent}    `;
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (Array.isArray(value)) return `[${value.map((each) => python(each, indent)).join(", ")}]`;
  if (typeof value === "object") {
    const fields = Object.entries(value).map(([name, each]) => `${deeper}${JSON.stringify(name)}: ${python(each, deeper)},`);
    return fields.length ? `{\n${fields.join("\n")}\n${indent}}` : "{}";
  }
  return JSON.stringify(value);
}

const ttlOf = ({ created_at: created, expires_at: expires }) => (expires === null ? null : Math.max(1, Math.round((Date.parse(expires) - Date.parse(created)) / 1_000)));
const isPlain = (params) => params !== null && typeof params === "object" && !Array.isArray(params) && Object.keys(params).every((name) => name && !name.includes("="));

export function curl(device, body, origin) {
  return `curl -sS ${shell(`${origin}/v1/devices/${encodeURIComponent(device)}/commands`)} \\
  -H "Authorization: Bearer $ORDAIN_KEY" -H 'Content-Type: application/json' \\
  -d ${shell(JSON.stringify(body))}`;
}

/** The code, by the name of its language or tool. */
export function snippets(command, origin) {
  const { type, hardware_id: device, params } = command;
  const ttl = ttlOf(command);
  const order = { name: type, device_ident: [device], data: params, ttl_sec: ttl };
  const pairs = isPlain(params) ? Object.entries(params).map(([name, value]) => shell(`${name}:=${JSON.stringify(value)}`)) : [];
  const send = ["ordain send", `--ttl ${ttl ?? 0}`, "--", device, type, ...pairs].join(" ");
  return {
    curl: curl(device, { type, params, ttl_sec: ttl }, origin),
    "ordain send": isPlain(params) ? send : "# `ordain send` takes only objects as parameters. Use curl.",
    Python: `import asyncio
import os

from broker.client import App


async def main():
    async with App(${JSON.stringify(origin)}, os.environ["ORDAIN_KEY"]) as app:
        print(await app.command.send(${python(order, "        ")}))


asyncio.run(main())
`,
    JavaScript: `// curl -O ${origin}/sdk/app.mjs
import { App } from "./app.mjs";

const app = new App(${JSON.stringify(origin)}, process.env.ORDAIN_KEY);
console.log(await app.command.send(${JSON.stringify(order, null, 2)}));
`,
  };
}
