// A receiver of webhooks in Express. It checks the signature over the bytes as they came, and handles each event
// once: a webhook is sent again until it is answered with 2xx, and keeps its id.
import express from "express";
import { Webhook } from "standardwebhooks";

const { SECRET, PORT = "9000" } = process.env;
const webhook = new Webhook(SECRET);
// A real service keeps the ids where it keeps what it made of the events, in the same transaction.
const handled = new Set();

const app = express();
app.post("/ordain", express.raw({ type: () => true }), (request, response) => {
  let event;
  try {
    event = webhook.verify(request.body, request.headers);
  } catch {
    return response.sendStatus(400);
  }
  if (!handled.has(request.headers["webhook-id"])) {
    console.log(event.type, event.subject);
    handled.add(request.headers["webhook-id"]);
  }
  response.sendStatus(204);
});
app.listen(Number(PORT), "127.0.0.1");
