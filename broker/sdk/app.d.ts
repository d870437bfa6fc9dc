// What `app.mjs` exports, for type checkers and editors.

export type Status = "pending" | "delivered" | "executed" | "failed" | "expired" | "cancelled";
export type StateName =
  | "pending"
  | "published"
  | "acknowledged"
  | "executed"
  | "failed"
  | "timed_out"
  | "expired"
  | "cancelled";

/** `data` is any JSON; a call repeated with the same key makes nothing twice. */
export interface SendParams {
  name: string;
  device_ident: readonly string[];
  data?: unknown;
  idempotency_key?: string;
}

/** `sent`: the command is on disk and will be delivered when the device is there. Else nothing was recorded. */
export type SendResult = { sent: true; command_id: string } | { sent: false; error: string };

/** `start` <= time < `end`, ISO 8601; `end` is now if left out. */
export interface HistoryParams {
  name: string;
  device_idents: readonly string[];
  start: string | Date;
  end?: string | Date;
}

/** One command that was sent: its payload, when it was created (ms since 1970), and what became of it. */
export interface HistoryRecord {
  value: any;
  timestamp: number;
  command_id: string;
  status: Status;
}

/** A command as `/v1` shows it. Times are RFC 3339 in UTC. */
export interface Command {
  id: string;
  device_id: string;
  hardware_id: string;
  type: string;
  status: Status;
  params: any;
  grant_token: string | null;
  result: any;
  error: { code: string; message: string; details?: any } | null;
  expires_at: string | null;
  delivered_at: string | null;
  executed_at: string | null;
  created_at: string;
  state: StateName;
  published_at: string | null;
  attempts: number;
  retry_of: string | null;
}

/**
 * A CloudEvent. `id` is its position in the log, `subject` the command, or the device, it is about. `type` is
 * `ordain.command.<event>.v1` or `ordain.device.<event>.v1`; `version` the place among the events of its subject,
 * from 1; `erased`: the data is gone for ever. `data` always names device and command.
 */
export interface Event {
  specversion: string;
  id: string;
  source: string;
  type: string;
  subject: string;
  time: string;
  datacontenttype: string;
  project: string;
  actor: string;
  schema: number;
  version: number;
  erased?: boolean;
  data: any;
}

/** `type` is a command's name, `event` such as `executed`, `command` an id; `signal` ends it while it waits. */
export interface EventFilters {
  after?: number | null;
  device?: string;
  type?: string;
  event?: string;
  command?: string;
  signal?: AbortSignal;
}

/** How often, and after how long at most, what fails for the moment is tried again; how long a try may take. */
export interface Options {
  retries?: number;
  backoffSec?: number;
  backoffCapSec?: number;
  timeoutSec?: number;
}

/**
 * A broker, for one project.
 *
 * What fails for the moment (no connection, 408, 429, 5xx) is repeated up to `retries` times (5), after a random
 * pause of at most `backoffSec` (0.5), doubled each time up to `backoffCapSec` (30), and never before the broker's
 * own Retry-After; where that is longer than the cap, the error is thrown instead. `timeoutSec` (30) bounds each try.
 */
export class App {
  constructor(url: string | URL, apiKey: string, options?: Options);
  readonly command: Commands;
}

/** `app.command`. */
export class Commands {
  private constructor();

  /**
   * Sends one command to one or more devices; what became of it for each.
   *
   * A sent command is durable: it is delivered when the device is there. More than 10,000 devices go in several
   * requests under the one idempotency key, which is made here if you give none. The `idempotencyKey` of an error
   * completes what was not sent, without doubles.
   */
  send(params: SendParams): Promise<Record<string, SendResult>>;

  /** The commands of one name that were sent to devices, oldest first; `[]` where there were none. */
  history(params: HistoryParams): Promise<Record<string, HistoryRecord[]>>;

  /**
   * Every event of the project in order, once each, as it is recorded; it ends when you leave it.
   *
   * `after` is a position: 0 for everything there is, an event's `id` for what follows it; without it, from now on.
   * A lost connection is made again, and the stream goes on where it was; only a first one that fails is given up,
   * after `retries`.
   */
  events(filters?: EventFilters): AsyncGenerator<Event, void, void>;

  /**
   * The command, once its `state` is executed, failed, timed_out, expired or cancelled.
   *
   * `timeout` in **seconds**; none waits for ever. The key needs `devices:read` and `events:read`. Each wait holds one
   * connection: a browser has six for each HTTP/1.1 host. Throws `Timeout` if it was not closed in time.
   */
  wait(commandId: string, timeout?: number | null): Promise<Command>;
}

/**
 * Whatever the broker refuses or cannot do. `code` is for programs, `message` a sentence; `status` is that of HTTP,
 * null if no answer came; `retryAfter` in seconds, if the broker said so; `idempotencyKey` that of a failed `send`.
 */
export class AppError extends Error {
  constructor(
    code: string,
    message: string,
    more?: {
      status?: number | null;
      details?: Record<string, any> | null;
      retryAfter?: number | null;
      cause?: unknown;
    },
  );
  readonly code: string;
  readonly status: number | null;
  readonly details: Record<string, any> | null;
  readonly retryAfter: number | null;
  idempotencyKey: string | null;
}

/** Something asked for is wrong: `details.field` and `details.reason` name it. */
export class InvalidRequest extends AppError {}
/** No key, or one that is unknown or revoked. */
export class Unauthorized extends AppError {}
/** The key lacks a scope. */
export class Forbidden extends AppError {}
/** Not known, or of another project. */
export class NotFound extends AppError {}
/** The state of things stands against it; the message says which. */
export class Conflict extends AppError {}
/** The idempotency key was used for something else. */
export class IdempotencyConflict extends Conflict {}
/** The device is gone. */
export class DeviceDeleted extends Conflict {}
/** What was asked for existed and was erased, or cannot be read any more. */
export class Gone extends AppError {}
/** The request or the payload of the command is larger than is taken. */
export class TooLarge extends AppError {}
/** Too many requests; `retryAfter` says when to come back. */
export class RateLimited extends AppError {}
/** Too many open commands. */
export class QueueFull extends AppError {}
/** No answer, or one that says the broker cannot answer now: whether it did what was asked is unknown. */
export class Unavailable extends AppError {}
/** `wait`: the command was not closed in time. It goes on; wait again. */
export class Timeout extends AppError {}
