"""A receiver of webhooks in FastAPI. Needs `fastapi`, `uvicorn` and `standardwebhooks`.

It checks the signature over exactly the received bytes. It handles each event once: an event is sent again,
with the same id, until it is answered with 2xx.
"""

import json
import os

import uvicorn
from fastapi import FastAPI, Request, Response
from standardwebhooks import Webhook, WebhookVerificationError

webhook = Webhook(os.environ["SECRET"])
app = FastAPI()
# A real service stores each id together with the result of the event, in one transaction.
handled: set[str] = set()


@app.post("/ordain")
async def receive(request: Request) -> Response:
    body = await request.body()
    try:
        webhook.verify(body, dict(request.headers))
    except WebhookVerificationError:
        return Response(status_code=400)
    if request.headers["webhook-id"] not in handled:
        event = json.loads(body)
        print(event["type"], event["subject"], flush=True)
        handled.add(request.headers["webhook-id"])
    return Response(status_code=204)


uvicorn.run(app, host="127.0.0.1", port=int(os.environ.get("PORT", "9000")), log_level="warning")
