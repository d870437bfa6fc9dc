// A door in Node: it unlocks, remembers the commands it executed, and refuses commands without a valid grant.
import { existsSync, readFileSync, writeFileSync } from "node:fs";
import { createRemoteJWKSet } from "jose";
import mqtt from "mqtt";
import { check } from "./grant.mjs";

const {
  DEVICE = "door-7",
  TOKEN,
  MQTT_URL = "mqtt://127.0.0.1:1883",
  ORDAIN_URL = "http://127.0.0.1:8080",
} = process.env;
const topic = (suffix) => `iotee/dev/${DEVICE}/${suffix}`;
const keys = createRemoteJWKSet(new URL("/.well-known/jwks.json", ORDAIN_URL));

// The last answer to each id, kept over a restart. If an id comes again, its answer is sent and nothing is executed.
const MEMORY = `${DEVICE}.json`;
const REMEMBERED = 1000;
const answers = new Map(existsSync(MEMORY) ? JSON.parse(readFileSync(MEMORY)) : []);

const client = mqtt.connect(MQTT_URL, {
  clientId: DEVICE,
  username: DEVICE,
  password: TOKEN,
  will: { topic: topic("status"), payload: "offline", qos: 1, retain: true },
  resubscribe: false, // we do it ourselves, before we say `online`
});

client.on("connect", () => {
  client.stream.setNoDelay(true);
  client.subscribe(topic("rls"), { qos: 1 }, (error) => {
    if (!error) client.publish(topic("status"), "online", { qos: 1, retain: true });
  });
});
client.on("error", (error) => console.error(error.message));

// The client keeps an answer without PUBACK and publishes it again after a reconnect.
const answer = (message) => client.publish(topic("ack"), JSON.stringify(message), { qos: 1 });

async function unlock({ id, params }) {
  console.log("unlock", id, params.for_sec ?? "");
  answer({ id, status: "progress", progress: { percent: 50, note: "turning" } });
  return { locked: false };
}

const commands = { unlock };

async function execute(command) {
  const { id, type, grant } = command;
  try {
    await check(grant, command, DEVICE, keys);
  } catch (error) {
    return { id, status: "failed", error: { code: "grant_refused", message: error.message } };
  }
  if (!(type in commands)) return { id, status: "failed", error: { code: "unknown_command", message: type } };
  answer({ id, status: "acknowledged" });
  return { id, status: "executed", result: await commands[type](command) };
}

// One command after the other: if a command comes twice, the second must find the answer of the first.
let turn = Promise.resolve();
client.on("message", (_, payload) => {
  turn = turn.then(async () => {
    const command = JSON.parse(payload);
    let last = answers.get(command.id);
    if (!last) {
      last = await execute(command);
      if (last.error?.code !== "grant_refused") {
        answers.set(command.id, last);
        if (answers.size > REMEMBERED) answers.delete(answers.keys().next().value);
        writeFileSync(MEMORY, JSON.stringify([...answers]));
      }
    }
    answer(last);
  }).catch((error) => console.error("ignored:", error.message));
});
