// A receiver of webhooks in Express. It checks the signature over exactly the received bytes. It handles each event
// once: an event is sent again, with the same id, until it is answered with 2xx.
import express from "express";
import { Webhook } from "standardwebhooks";

const { SECRET, PORT = "9000" } = process.env;
const webhook = new Webhook(SECRET);
// A real service stores each id together with the result of the event, in one transaction.
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
