// A form to send a command. Its fields follow the JSON Schema of the device type.

import { encoded, get, post } from "./api.mjs";
import { html, useEffect, useState } from "./html.mjs";
import { CopyButton, Failure, Skeleton, useAction, useLoad } from "./parts.mjs";
import { Link } from "./route.mjs";
import { curl } from "./snippets.mjs";

const newKey = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), (one) => one.toString(16).padStart(2, "0")).join("");

const kindOf = (schema) => {
  const type = [].concat(schema.type ?? []).find((each) => each !== "null");
  if (Array.isArray(schema.enum)) return "choice";
  return ["integer", "number", "boolean", "string"].includes(type) ? type : "json";
};

/** The value that a field's text means; `undefined` if it is empty. Raises SyntaxError if JSON is needed and it is not. */
function valueOf(schema, text) {
  if (text === "" || text === undefined) return undefined;
  const kind = kindOf(schema);
  if (kind === "choice") return schema.enum[Number(text)];
  if (kind === "boolean") return text === "true";
  if (kind === "integer" || kind === "number") return Number(text);
  return kind === "string" ? text : JSON.parse(text);
}

/** The text of a field for a value: the inverse of `valueOf`. */
function textOf(schema, value) {
  if (value === undefined) return "";
  const kind = kindOf(schema);
  if (kind === "choice") return String(schema.enum.findIndex((each) => JSON.stringify(each) === JSON.stringify(value)));
  return kind === "json" ? JSON.stringify(value) : String(value);
}

export function Form({ device, clone, sent }) {
  const { data, error } = useLoad(async (stop) => {
    const [types, old] = await Promise.all([get("/v1/types", {}, stop), clone ? get(`/v1/commands/${encoded(clone)}`, { grant: false }, stop).catch(() => null) : null]);
    return { type: types.data.find((each) => each.name === device.type) ?? null, old };
  }, [device.type, clone]);
  if (error) return html`<${Failure} error=${error} />`;
  if (!data) return html`<${Skeleton} />`;
  if (!data.type) return html`<p class="dim">The device type ${device.type} no longer exists, so no command can be sent.</p>`;
  return html`<${Fields} key=${`${device.id} ${data.old?.id}`} device=${device} type=${data.type} old=${data.old} sent=${sent} />`;
}

function Fields({ device, type, old, sent }) {
  const names = type.commands.map((each) => each.name);
  const [name, choose] = useState(old?.type ?? names[0] ?? "");
  const [texts, write] = useState({});
  const [free, writeFree] = useState(old ? JSON.stringify(old.params) : "{}");
  const [ttl, writeTtl] = useState("");
  const [key, renew] = useState(newKey());
  const [made, show] = useState(null);
  const command = type.commands.find((each) => each.name === name);
  const schema = command?.params ?? null;
  const fields = schema?.type === "object" ? Object.entries(schema.properties ?? {}) : null;
  const required = new Set(schema?.required ?? []);
  const sorted = fields?.sort(([one], [other]) => required.has(other) - required.has(one)) ?? [];
  const closed = fields !== null && (sorted.length > 0 || schema.additionalProperties === false);
  useEffect(() => {
    const params = old && old.type === name && old.params !== null && typeof old.params === "object" ? old.params : {};
    write(Object.fromEntries(sorted.map(([field, each]) => [field, textOf(each, params[field])])));
  }, [name]);
  useEffect(() => renew(newKey()), [name, texts, free, ttl]);

  const wrong = {};
  let params = {};
  if (closed) {
    for (const [field, each] of sorted) {
      try {
        const value = valueOf(each, texts[field]);
        if (value !== undefined) params[field] = value;
        else if (required.has(field)) wrong[field] = "is needed";
      } catch {
        wrong[field] = "must be JSON";
      }
    }
  } else {
    try {
      params = JSON.parse(free || "{}");
    } catch {
      wrong.params = "must be JSON";
    }
  }
  const body = { type: name, params, ...(ttl === "" ? {} : { ttl_sec: Number(ttl) || null }) };
  const [send, { busy, error }] = useAction(async () => {
    if (Object.keys(wrong).length) throw new Error(Object.entries(wrong).map(([field, why]) => `${field} ${why}`).join("; "));
    show(await post(`/v1/devices/${encoded(device.id)}/commands`, { ...body, idempotency_key: key }));
    renew(newKey());
    sent();
  });
  const submit = (event) => {
    event.preventDefault();
    send();
  };
  return html`<form class="send" onSubmit=${submit}>
    <div class="fields">
      <label><span>Command</span>${type.open ? html`<input required maxlength="64" pattern="[A-Za-z0-9][A-Za-z0-9_\\-]*" list="commands" value=${name} placeholder="unlock" onInput=${(event) => choose(event.target.value)} /><datalist id="commands">${names.map((each) => html`<option key=${each} value=${each} />`)}</datalist>` : html`<select value=${name} onChange=${(event) => choose(event.target.value)}>${type.commands.map((each) => html`<option key=${each.name} value=${each.name}>${each.title ? `${each.name}: ${each.title}` : each.name}</option>`)}</select>`}</label>
      ${closed ? sorted.map(([field, each]) => html`<${Field} key=${`${name} ${field}`} name=${field} schema=${each} required=${required.has(field)} text=${texts[field] ?? ""} write=${(text) => write({ ...texts, [field]: text })} />`) : html`<label><span>Parameters (JSON)</span><textarea rows="3" spellcheck="false" value=${free} onInput=${(event) => writeFree(event.target.value)}></textarea></label>`}
      <label><span>TTL (seconds)</span><input type="number" min="0" max="31536000" step="1" value=${ttl} placeholder=${`${command?.default_ttl_sec ?? "default"}; 0 = never expires`} onInput=${(event) => writeTtl(event.target.value)} /></label>
      <div class="actions"><button type="submit" class="primary" disabled=${busy || !name}>Send</button>
        ${made && !error && html`<span role="status">Accepted: <${Link} to=${`/commands/${made.id}`}>${made.type}<//></span>`}</div>
      ${error && html`<p class="wrong" role="alert">${error.details?.field ? `${error.details.field}: ` : ""}${error.message}</p>`}
    </div>
    <div class="same"><p class="dim">As curl</p><pre tabindex="0">${curl(device.hardware_id, body, location.origin)}</pre><${CopyButton} text=${curl(device.hardware_id, body, location.origin)} /></div>
  </form>`;
}

function Field({ name, schema, required, text, write }) {
  const kind = kindOf(schema);
  const said = schema.default === undefined ? "" : `default ${JSON.stringify(schema.default)}`;
  const bounds = { min: schema.minimum, max: schema.maximum, maxlength: schema.maxLength, pattern: schema.pattern };
  const common = { value: text, required, onInput: (event) => write(event.target.value) };
  let control;
  if (kind === "choice" || kind === "boolean") {
    const options = kind === "boolean" ? [["true", "true"], ["false", "false"]] : schema.enum.map((each, index) => [String(index), JSON.stringify(each)]);
    control = html`<select ...${common}><option value="">${said || (required ? "choose" : "not set")}</option>${options.map(([value, shown]) => html`<option key=${value} value=${value}>${shown}</option>`)}</select>`;
  } else if (kind === "json") control = html`<textarea rows="2" spellcheck="false" placeholder=${said || "JSON"} ...${common}></textarea>`;
  else if (kind === "string") control = html`<input placeholder=${said} maxlength=${bounds.maxlength} ...${common} />`;
  else control = html`<input type="number" step=${kind === "integer" ? 1 : "any"} min=${bounds.min} max=${bounds.max} placeholder=${said} ...${common} />`;
  const limits = kind === "integer" || kind === "number" ? [bounds.min, bounds.max].filter((each) => each !== undefined).join(" to ") : "";
  return html`<label><span>${name}${required ? " (needed)" : ""}${limits && html` <span class="dim">${limits}</span>`}</span>${control}${(schema.description || schema.title) && html`<span class="dim">${schema.description || schema.title}</span>`}</label>`;
}
