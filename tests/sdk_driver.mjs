// Calls of the JavaScript SDK for tests, all in one process: each connection to the port that is printed is one
// call. Its first line is JSON with module, url, key, options, call, arguments and take.
// Each event is a line of JSON as it comes; the last line is {"answer"}, {"error"} or, for an error that is not
// of the SDK's own classes, {"thrown"}. The process ends with its standard input.

import { AsyncLocalStorage } from "node:async_hooks";
import { createServer } from "node:net";
import { createInterface } from "node:readline";

// Each call has connections of its own, which are closed at its end: an aborted request can leave one open.
const connections = new AsyncLocalStorage();
const { fetch } = globalThis;
fetch("data:,").then((answer) => answer.text()); // makes the dispatcher, whose class Node does not export
const dispatcher = globalThis[Symbol.for("undici.globalDispatcher.1")];
if (!dispatcher) throw new Error(`Node ${process.version} has no Symbol.for("undici.globalDispatcher.1")`);
const Connections = dispatcher.constructor;
globalThis.fetch = (url, options) => fetch(url, { ...options, dispatcher: connections.getStore() });

function outcome(error, AppError) {
  if (!(error instanceof AppError)) return { thrown: `${error}` };
  const { name, code, message, status, details, retryAfter, idempotencyKey } = error;
  return {
    error: { name, code, message, status, details, retry_after: retryAfter, idempotency_key: idempotencyKey },
  };
}

async function made({ module, url, key, options, call, arguments: given, take }, say, signal) {
  const { App, AppError } = await import(module);
  try {
    const app = new App(url, key, options);
    if (call !== "events") return { answer: await app.command[call](...given) };
    let left = take;
    for await (const event of app.command.events({ ...given[0], signal })) {
      say(event);
      left -= 1;
      if (left === 0) break;
    }
    return { answer: null };
  } catch (error) {
    return outcome(error, AppError);
  }
}

const server = createServer((socket) => {
  const say = (line) => socket.write(`${JSON.stringify(line)}\n`);
  const left = new AbortController();
  socket.on("error", () => socket.destroy()); // a test that ended before its call
  socket.on("close", () => left.abort());
  createInterface({ input: socket }).once("line", async (line) => {
    const own = new Connections();
    const last = await connections.run(own, () => made(JSON.parse(line), say, left.signal));
    await own.destroy();
    say(last);
    socket.end();
  });
});
server.listen(0, "127.0.0.1", () => console.log(server.address().port));
process.stdin.on("end", () => process.exit()).resume();
