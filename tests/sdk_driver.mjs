// One call of the JavaScript SDK for a test: what it is is JSON on standard
// input: module, url, key, options, call, arguments, take.
// Each event is a line of JSON as it comes; the last line is {"answer"} or {"error"}.

import { readFileSync } from "node:fs";

const { module, url, key, options, call, arguments: given, take } = JSON.parse(readFileSync(0));
const { App, AppError } = await import(module);
const say = (line) => process.stdout.write(`${JSON.stringify(line)}\n`);

try {
  const app = new App(url, key, options);
  if (call === "events") {
    let left = take;
    for await (const event of app.command.events(...given)) {
      say(event);
      left -= 1;
      if (left === 0) break;
    }
    say({ answer: null });
  } else {
    say({ answer: await app.command[call](...given) });
  }
} catch (error) {
  if (!(error instanceof AppError)) throw error;
  const { name, code, message, status, details, retryAfter, idempotencyKey } = error;
  say({ error: { name, code, message, status, details, retry_after: retryAfter, idempotency_key: idempotencyKey } });
}
