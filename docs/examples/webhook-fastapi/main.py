"""A receiver of webhooks in FastAPI. Needs `fastapi`, `uvicorn` and `standardwebhooks`.

It checks the signature over the bytes as they came, and handles each event once: a webhook is sent again
until it is answered with 2xx, and keeps its id.
"""

import json
import os

import uvicorn
from fastapi import FastAPI, Request, Response
from standardwebhooks import Webhook, WebhookVerificationError

webhook = Webhook(os.environ["SECRET"])
app = FastAPI()
# A real service keeps the ids where it keeps what it made of the events, in the same transaction.
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
