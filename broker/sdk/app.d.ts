// The types of `app.mjs`, for type checkers and editors.

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

/**
 * The parameters of `send`. `data`: any JSON. A repeated call with the same key creates nothing twice.
 *
 * `ttl_sec`: seconds after which the command is no longer delivered. Absent: what the device's type says, else it
 * waits for ever; null: it waits for ever. `collapse_key`: cancels pending commands of the device that have the same
 * key.
 */
export interface SendParams {
  name: string;
  device_ident: readonly string[];
  data?: unknown;
  idempotency_key?: string;
  ttl_sec?: number | null;
  collapse_key?: string;
}

/** `sent` true: the command is durable and is delivered when the device is online. False: no command was created. */
export type SendResult = { sent: true; command_id: string } | { sent: false; error: string };

/** The parameters of `history`: `start` <= time < `end`, both ISO 8601; `end` is now if absent. */
export interface HistoryParams {
  name: string;
  device_idents: readonly string[];
  start: string | Date;
  end?: string | Date;
}

/** One command that was sent. `value`: its data. `timestamp`: when it was created, in ms since 1970. */
export interface HistoryRecord {
  value: any;
  timestamp: number;
  command_id: string;
  status: Status;
}

/** A command as `/v1` shows it. Times are RFC 3339 in UTC. `get` and `wait` ask for no `grant_token`. */
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

/** The new command of a retry. `may_repeat`: the old one timed out, so its device may have executed it. */
export interface Retried extends Command {
  may_repeat: boolean;
}

/**
 * The reason for a command's state: a sentence (`summary`), and for programs `reasons` with a `code` each. `next`: what
 * happens next by itself; null: nothing.
 */
export interface Explanation {
  command_id: string;
  state: StateName;
  summary: string;
  reasons: { code: string; [more: string]: any }[];
  next: { action: string; at?: string } | null;
}

/**
 * A CloudEvent. `id`: its position in the log. `source`: the log. `subject`: the id of its command or device. `type`:
 * `ordain.command.<event>.v1` or `ordain.device.<event>.v1`. `version`: its number among the events of its subject,
 * from 1. `erased`: true if the data was erased. `data` always names device and command.
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

/** Where an event is, with its log: `<log id>:<position>`. Store it, and pass it as `after` to continue. */
export function position(event: Event): string;

/**
 * `type`: a command's name. `event`: such as `executed`. `command`: an id. `signal`: stops the stream.
 * `onConnection`: called with true when the stream connects and with false when it breaks.
 */
export interface EventFilters {
  after?: number | string | Event | null;
  device?: string;
  type?: string;
  event?: string;
  command?: string;
  signal?: AbortSignal;
  onConnection?: (up: boolean, error?: AppError) => void;
}

/** The limits for retries of temporary failures, and the time limit of each try; see `App`. */
export interface Options {
  retries?: number;
  backoffSec?: number;
  backoffCapSec?: number;
  timeoutSec?: number;
}

/**
 * A client of one broker and one project.
 *
 * Temporary failures (no connection, 408, 429, 5xx) are retried up to `retries` (5) times. Before each retry the
 * client pauses for a random time of at most `backoffSec` (0.5), doubled each time up to `backoffCapSec` (30), and at
 * least for the broker's Retry-After. If Retry-After is longer than `backoffCapSec`, the error is thrown instead.
 * `timeoutSec` (30) limits each try.
 */
export class App {
  constructor(url: string | URL, apiKey: string, options?: Options);
  readonly command: Commands;
}

/** `app.command`. */
export class Commands {
  private constructor();

  /**
   * Sends one command to one or more devices; resolves to the outcome for each device.
   *
   * A sent command is durable and is delivered when the device is online. More than 10,000 devices are split into
   * several requests with the same idempotency key. Without `idempotency_key` one is generated. After an error, call
   * `send` again with the error's `idempotencyKey`: it sends the missing commands and nothing twice.
   */
  send(params: SendParams): Promise<Record<string, SendResult>>;

  /** The commands with one name that were sent to the devices, oldest first; `[]` for a device without any. */
  history(params: HistoryParams): Promise<Record<string, HistoryRecord[]>>;

  /**
   * Yields every event of the project as it is recorded, in order, each one once. It does not end by itself: leave
   * the loop to stop it.
   *
   * `after`: 0 for all events in the log; an event, or the text that `position(event)` gives, for the events after it;
   * without it, events from now on. Store that text to continue later: unlike a bare `id`, it also names the log, and
   * after a restore from a backup you get `Gone` instead of a gap. After a lost connection it reconnects and continues where it was. Only if the first connection
   * fails, it gives up after `retries`.
   */
  events(filters?: EventFilters): AsyncGenerator<Event, void, void>;

  /** The command as it is now, without its grant. Throws `NotFound` if there is none. */
  get(commandId: string): Promise<Command>;

  /**
   * Cancels a command that was never handed over. Cancelling it again changes nothing. Throws `Conflict` if the device
   * may already have it; the message names the state.
   */
  cancel(commandId: string): Promise<Command>;

  /**
   * Sends a command again that failed, timed out, expired or was cancelled; resolves to the new command. Without
   * `idempotencyKey` one is generated. After an error whose outcome is unknown, call `retry` again with the error's
   * `idempotencyKey`: it creates nothing twice.
   */
  retry(commandId: string, idempotencyKey?: string | null): Promise<Retried>;

  /** Why the command is in its state, and what happens next. */
  explain(commandId: string): Promise<Explanation>;

  /**
   * Waits until a command is closed and resolves to it. Its `state` is then executed, failed, timed_out, expired or
   * cancelled.
   *
   * `timeout`: in **seconds**; without it there is no limit. The key needs the scopes `devices:read` and
   * `events:read`. Each wait uses one connection; a browser allows six per HTTP/1.1 host. Throws `Timeout` if the
   * command was not closed in time.
   */
  wait(commandId: string, timeout?: number | null): Promise<Command>;
}

/**
 * The base class of all errors of the SDK. `code` is for programs, `message` is a sentence for people. `status`: the
 * HTTP status, null if no answer came. `retryAfter`: seconds to wait, if the broker gave them. `idempotencyKey`: the
 * key of a failed `send`.
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

/** The request is wrong: `details.field` names the field, `details.reason` the reason. */
export class InvalidRequest extends AppError {}
/** The key is missing, unknown or revoked. */
export class Unauthorized extends AppError {}
/** The key lacks a scope. */
export class Forbidden extends AppError {}
/** The object does not exist, or it belongs to another project. */
export class NotFound extends AppError {}
/** The current state does not allow the request; the message gives the reason. */
export class Conflict extends AppError {}
/** The idempotency key was used for a different request. */
export class IdempotencyConflict extends Conflict {}
/** The device was deleted. */
export class DeviceDeleted extends Conflict {}
/** The requested data existed, but was erased or is no longer stored. */
export class Gone extends AppError {}
/** The request or the payload of the command is too large. */
export class TooLarge extends AppError {}
/** Too many requests; `retryAfter` gives the seconds to wait. */
export class RateLimited extends AppError {}
/** Too many open commands. */
export class QueueFull extends AppError {}
/** No answer came, or the broker could not answer now. It is unknown if the request took effect. */
export class Unavailable extends AppError {}
/** `wait`: the command was not closed in time. It is still open; you can wait again. */
export class Timeout extends AppError {}
