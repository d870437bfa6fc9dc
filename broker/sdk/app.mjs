// The JavaScript SDK for services: send commands, follow events, wait for the outcome of a command. For
// browsers and Node 20 or later, without dependencies. It works like the Python module `broker.client`: a
// request whose outcome is unknown is repeated only with the same idempotency key.

const DEVICES_PER_CALL = 10_000;
// The broker writes to each stream at least every 15 s. After three times that the connection counts as lost.
const QUIET_SEC = 45;
const WITHOUT_GRANT = { grant: "false" }; // a grant is for the device, and signing it takes time
const CLOSED = new Set(["executed", "failed", "timed_out", "expired", "cancelled"]);
// `<log id>:<position>`; an older broker says only the position.
const PLACE = /^(?:(log_[0-9a-z]+):)?(\d+)$/;
const LONGEST_TIMER_MS = 2 ** 31 - 1;

/** The base class of all errors of the SDK. */
export class AppError extends Error {
  constructor(code, message, { status = null, details = null, retryAfter = null, cause } = {}) {
    super(message, { cause });
    this.name = new.target.name;
    this.code = code;
    this.status = status;
    this.details = details;
    this.retryAfter = retryAfter;
    this.idempotencyKey = null;
  }
}
export class InvalidRequest extends AppError {}
export class Unauthorized extends AppError {}
export class Forbidden extends AppError {}
export class NotFound extends AppError {}
export class Conflict extends AppError {}
export class IdempotencyConflict extends Conflict {}
export class DeviceDeleted extends Conflict {}
export class Gone extends AppError {}
export class TooLarge extends AppError {}
export class RateLimited extends AppError {}
export class QueueFull extends AppError {}
export class Unavailable extends AppError {}
export class Timeout extends AppError {}

const ERRORS = {
  invalid_request: InvalidRequest,
  unauthorized: Unauthorized,
  forbidden: Forbidden,
  not_found: NotFound,
  conflict: Conflict,
  idempotency_conflict: IdempotencyConflict,
  device_deleted: DeviceDeleted,
  gone: Gone,
  too_large: TooLarge,
  rate_limit_exceeded: RateLimited,
  queue_full: QueueFull,
};

// It does not repeat the URL, because a part of it could be a password.
const WRONG_URL =
  "url: must be an http or https URL such as http://127.0.0.1:8080, without user, password, query and fragment";

/** True for a URL of scheme, host, port and path, and nothing else. */
function isBase(url) {
  return /^https?:\/\/[^\s@?#\\]+$/.test(String(url)) && URL.canParse(String(url));
}

/** Where an event is, with its log: `<log id>:<position>`. Store it, and pass it as `after` to continue. */
export function position(event) {
  return `${event.source.split("/").pop()}:${event.id}`;
}

/** A client of one broker and one project. */
export class App {
  #url;
  #key;
  #options;

  constructor(url, apiKey, { retries = 5, backoffSec = 0.5, backoffCapSec = 30, timeoutSec = 30 } = {}) {
    if (!isBase(url)) throw new TypeError(WRONG_URL);
    if (!/^[ -~]+$/.test(apiKey)) throw new TypeError("apiKey: must be a key such as sk_live_…");
    this.#url = String(url).replace(/\/+$/, "");
    this.#key = apiKey;
    this.#options = { retries, backoffSec, backoffCapSec, timeoutSec };
    this.command = new Commands(
      (...request) => this.#request(...request),
      (...stream) => this.#stream(...stream),
    );
  }

  #fetch(method, path, { query = {}, headers = {}, ...more }) {
    const search = new URLSearchParams(query).toString();
    return fetch(`${this.#url}${path}${search && `?${search}`}`, {
      method,
      headers: { Authorization: `Bearer ${this.#key}`, ...headers },
      cache: "no-store",
      credentials: "omit",
      redirect: "manual",
      ...more,
    });
  }

  /** Sends a request, with retries, and resolves to the answer's JSON. */
  async #request(method, path, { body, query, signal } = {}) {
    const { retries, backoffCapSec, timeoutSec } = this.#options;
    const content = body === undefined ? {} : { body: JSON.stringify(body) };
    if (body !== undefined) content.headers = { "Content-Type": "application/json" };
    for (let failures = 1; ; failures += 1) {
      const link = linked(signal);
      const late = setTimeout(() => link.abort(new Error(`within ${timeoutSec} s`)), timeoutSec * 1_000);
      let error;
      try {
        const answer = await this.#fetch(method, path, { query, ...content, signal: link.signal });
        const text = await answer.text();
        if (answer.ok) return parsed(text);
        error = failure(answer, text);
      } catch (broken) {
        if (signal?.aborted) throw signal.reason;
        if (broken instanceof AppError) throw broken;
        error = unreachable(broken);
      } finally {
        clearTimeout(late);
        link.release();
      }
      const floor = error.retryAfter ?? 0;
      if (!isTemporary(error) || failures > retries || floor > backoffCapSec) throw error;
      await this.#pause(failures, floor, signal);
    }
  }

  /** The events after a place, or from now on if it is null. Reconnects after a lost connection. */
  async *#stream(after, query, signal, onConnection = () => {}) {
    let place = after === null ? null : placeOf(after);
    let failures = 0;
    let opened = false;
    let reconnectSec = 0;
    for (;;) {
      const link = linked(signal);
      let quiet;
      const heard = () => {
        clearTimeout(quiet);
        quiet = setTimeout(() => link.abort(new Error(`for ${QUIET_SEC} s`)), QUIET_SEC * 1_000);
      };
      let floor = reconnectSec;
      try {
        heard();
        const known = place === null ? {} : { after: place.text };
        const headers = { Accept: "text/event-stream" };
        if (place !== null) headers["Last-Event-ID"] = place.text;
        const asked = { query: { ...query, ...known }, headers, signal: link.signal };
        const answer = await this.#fetch("GET", "/v1/events", asked);
        if (!answer.ok) throw failure(answer, await answer.text());
        if (!/^text\/event-stream\b/.test(answer.headers.get("content-type") ?? "")) {
          throw new Error("the answer is not an event stream");
        }
        failures = 0;
        opened = true;
        onConnection(true);
        for await (const message of messages(answer.body, heard)) {
          if (message.retry !== undefined) reconnectSec = floor = message.retry / 1_000;
          if (message.id === undefined) continue;
          const before = place;
          place = following(placeOf(message.id), before);
          // An id without data is no event; it only gives the stream's position.
          if (message.data && (before === null || place.position > before.position)) {
            clearTimeout(quiet); // the caller may take any time to handle the event
            yield parsed(message.data);
            heard();
          }
        }
        failures += 1;
        onConnection(false);
      } catch (broken) {
        if (signal?.aborted) throw signal.reason;
        const error = broken instanceof AppError ? broken : unreachable(broken);
        failures += 1;
        // A stream that was open once is retried without limit; `retries` only limits the first connection.
        if (!isTemporary(error) || (failures > this.#options.retries && !opened)) throw error;
        floor = Math.max(floor, error.retryAfter ?? 0);
        onConnection(false, error);
      } finally {
        clearTimeout(quiet);
        link.abort();
        link.release();
      }
      await this.#pause(failures, floor, signal);
    }
  }

  #pause(failures, floorSec, signal) {
    const { backoffSec, backoffCapSec } = this.#options;
    const ceiling = Math.min(backoffCapSec, backoffSec * 2 ** Math.min(failures - 1, 32));
    return sleep(floorSec + Math.random() * ceiling, signal);
  }
}

/** `app.command`. */
export class Commands {
  #request;
  #stream;

  constructor(request, stream) {
    this.#request = request;
    this.#stream = stream;
  }

  async send(params) {
    const body = { idempotency_key: newKey(), ...params };
    const sent = {};
    try {
      for (const part of batches(params.device_ident)) {
        const asked = { body: { ...body, device_ident: part } };
        Object.assign(sent, await this.#request("POST", "/v1/app/command/send", asked));
      }
    } catch (error) {
      if (error instanceof AppError) error.idempotencyKey = body.idempotency_key;
      throw error;
    }
    return sent;
  }

  async history(params) {
    return await this.#request("POST", "/v1/app/command/history", { body: params });
  }

  events({ after = null, device, type, event, command, signal, onConnection } = {}) {
    const filters = Object.entries({ device, type, event, command }).filter(([, value]) => value != null);
    const start = typeof after === "object" && after !== null ? position(after) : after;
    return this.#stream(start === null ? null : String(start), Object.fromEntries(filters), signal, onConnection);
  }

  async get(commandId) {
    return await this.#get(commandId);
  }

  #get(commandId, signal) {
    return this.#request("GET", pathOf(commandId), { query: WITHOUT_GRANT, signal });
  }

  async cancel(commandId) {
    const { device_id: device } = await this.#get(commandId);
    return await this.#request("DELETE", `/v1/devices/${device}/commands/${encodeURIComponent(commandId)}`);
  }

  async retry(commandId, idempotencyKey = null) {
    const key = idempotencyKey ?? newKey();
    try {
      return await this.#request("POST", `${pathOf(commandId)}/retry`, { body: { idempotency_key: key } });
    } catch (error) {
      if (error instanceof AppError) error.idempotencyKey = key;
      throw error;
    }
  }

  async explain(commandId) {
    return await this.#request("GET", `${pathOf(commandId)}/explain`);
  }

  async wait(commandId, timeout = null) {
    const path = pathOf(commandId);
    const { abort, signal } = linked();
    const ms = timeout === null ? LONGEST_TIMER_MS : Math.min(timeout * 1_000, LONGEST_TIMER_MS);
    const late = new Timeout("timeout", `${commandId} was not closed within ${timeout} s`);
    const timer = timeout === null ? undefined : setTimeout(() => abort(late), ms);
    try {
      const created = await this.#request("GET", `${path}/events`, { query: { limit: "1" }, signal });
      const after = created.data[0].position;
      for await (const event of this.events({ after, command: commandId, signal })) {
        if (CLOSED.has(event.type.split(".")[2])) {
          const command = await this.#get(commandId, signal);
          if (CLOSED.has(command.state)) return command;
        }
      }
    } finally {
      clearTimeout(timer);
      abort();
    }
  }
}

/** Parses server-sent events from a stream of bytes. An incomplete message at the end is dropped. */
async function* messages(body, heard) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let message = { data: [] };
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    heard();
    // A CR at the end of a chunk can be the first half of a CRLF.
    const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
    rest = lines.pop();
    for (const line of lines) {
      const colon = line.indexOf(":");
      const field = colon < 0 ? line : line.slice(0, colon);
      const text = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
      if (line === "") {
        yield { ...message, data: message.data.join("\n") };
        message = { data: [] };
      } else if (field === "data") message.data.push(text);
      else if (field === "id" && PLACE.test(text)) message.id = text;
      else if (field === "retry" && /^\d+$/.test(text)) message.retry = Number(text);
    }
  }
}

/** A place in a log, as text and as a position. `log` undefined: the caller gave only a number. */
function placeOf(text) {
  const [, log, number] = PLACE.exec(text) ?? [];
  return { text, log, position: number === undefined ? -1 : Number(number) };
}

/**
 * The place after a new message: that of the message, or `before` if the broker repeats what was already seen. Throws
 * `Gone` if it lies in another log, because its position then says nothing about the events in between.
 */
function following(place, before) {
  if (before === null) return place;
  if (place.log && before.log && place.log !== before.log) {
    throw new Gone("gone", `the broker's log was replaced: ${before.text} belongs to another log`);
  }
  if (place.position === before.position) return before.log ? before : place;
  return place.position > before.position ? place : before;
}

/** Splits the devices into one list per request. A wrong type is passed on; the broker refuses it. */
function batches(devices) {
  if (!Array.isArray(devices) || devices.length <= DEVICES_PER_CALL) return [devices];
  const parts = [];
  for (let first = 0; first < devices.length; first += DEVICES_PER_CALL) {
    parts.push(devices.slice(first, first + DEVICES_PER_CALL));
  }
  return parts;
}

function pathOf(commandId) {
  return `/v1/commands/${encodeURIComponent(commandId)}`;
}

/** A random idempotency key. crypto.randomUUID is not used: browsers offer it only on HTTPS pages. */
function newKey() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch (broken) {
    throw new AppError("unexpected_answer", `the answer is not from a broker: ${broken.message}`);
  }
}

/** The error for an HTTP answer. The answer can also come from a proxy, in another form. */
function failure(answer, text) {
  const { status } = answer;
  let said;
  try {
    said = JSON.parse(text).error;
  } catch {
    said = undefined;
  }
  const { code, message, details = null } = said?.code && said.message ? said : foreign(status);
  const kind = status >= 500 ? Unavailable : (ERRORS[code] ?? AppError);
  const told = answer.headers.get("Retry-After") ?? "";
  return new kind(code, message, { status, details, retryAfter: /^\d+$/.test(told) ? Number(told) : null });
}

function foreign(status) {
  return { code: `http_${status}`, message: `status ${status}, without an error of the broker` };
}

function unreachable(broken) {
  const reason = broken?.cause?.message || broken?.message || String(broken);
  return new Unavailable("unavailable", `no answer: ${reason}`, { cause: broken });
}

/** True if the same request can succeed later. */
function isTemporary(error) {
  return error instanceof Unavailable || error.status === 408 || error.status === 429;
}

/** An AbortController that the caller's signal also aborts; `release` stops listening to that signal. */
function linked(signal) {
  const controller = new AbortController();
  const stop = () => controller.abort(signal.reason);
  if (signal?.aborted) stop();
  signal?.addEventListener("abort", stop, { once: true });
  return {
    signal: controller.signal,
    abort: (reason) => controller.abort(reason),
    release: () => signal?.removeEventListener("abort", stop),
  };
}

function sleep(sec, signal) {
  return new Promise((done, fail) => {
    const link = linked(signal);
    const timer = setTimeout(() => (link.release(), done()), sec * 1_000);
    link.signal.addEventListener("abort", () => (clearTimeout(timer), fail(link.signal.reason)));
    if (link.signal.aborted) fail(link.signal.reason);
  });
}
