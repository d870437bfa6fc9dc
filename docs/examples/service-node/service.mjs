// A service in Node: it unlocks a door, waits for the end, and prints the outcome.
import { App, Timeout } from "./app.mjs";

const { ORDAIN_URL = "http://127.0.0.1:8080", DEVICE = "demo_lock", KEY } = process.env;
const app = new App(ORDAIN_URL, KEY);

const sent = await app.command.send({ name: "unlock", device_ident: [DEVICE], data: { for_sec: 5 } });
const answer = sent[DEVICE];
if (!answer.sent) {
  console.log(`${DEVICE}: ${answer.error}`);
} else {
  try {
    const command = await app.command.wait(answer.command_id, 30);
    console.log(`${DEVICE}: ${command.state} ${JSON.stringify(command.result ?? command.error)}`);
  } catch (error) {
    if (!(error instanceof Timeout)) throw error;
    console.log(`${DEVICE}: no end after 30 s; the command goes on`);
  }
}
