"""The AsyncAPI 3 document of the MQTT side, generated from the device types and the wire Structs.

It takes the broker's view: the broker sends commands and events, and receives answers and statuses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from litestar import Response, get

from broker import __version__
from broker.domain.cloudevents import CloudEvent
from broker.http.edge.auth import Call
from broker.http.edge.services import served
from devices.grant import Claims
from devices.names import PATTERN as NAME_PATTERN
from devices.names import device_topic
from devices.types import ANY, CommandType, DeviceType, PayloadFormat
from devices.wire import AnswerMessage, CommandMessage, StatusMessage

CONTENT: dict[PayloadFormat, str] = {
    "json": "application/json",
    "msgpack": "application/msgpack",
    "bare": "text/plain",
}
DESCRIPTION = """The broker sends commands and devices send answers, both with QoS 1. MQTT 3.1.1 is enough;
MQTT 5 adds Correlation Data, Response Topic, expiry and user properties.

**The one duty of a device**: it never executes the same command id twice. If an id comes again, it sends its
last answer for that id again.

Subscribe first, then publish `online`. After a reconnect publish each answer again that had no PUBACK.

Device types with topics or payloads of their own are not in here: see the documentation of their makers."""
GRANT = """The claims of a grant: a JWT with `typ` `grant+jwt`, signed with EdDSA or, for small devices,
HS256. Public keys: `/.well-known/jwks.json`. Before it executes a command, a device checks the signature with
the key and the one algorithm that `kid` stands for, then `iss`, `aud`, `nbf` and `exp`, and that `sub`, `cmd`
and `phs` fit the command's `id`, `type` and `params`."""
DEVICE = "{hardware_id}"
HARDWARE_ID = {"description": "The device's `hardware_id`, which is also its client id and user name."}
QOS_1 = {"qos": 1, "retain": False, "bindingVersion": "0.2.0"}
SECURITY = {
    "device": "User name and client id: the `hardware_id`. Password: the device's token.",
    "service": "User name: `service`. Password: an API key with `events:read`.",
}


@get("/asyncapi.json", include_in_schema=False)
async def description(request: Call) -> Response[bytes]:
    app, commands = served(request.scope), request.services.commands
    if app.asyncapi is None:
        app.asyncapi = msgspec.json.encode(document(commands.types, commands.prefix))
    return Response(app.asyncapi, media_type="application/json")


def document(types: Mapping[str, DeviceType], prefix: str) -> dict[str, Any]:
    """The AsyncAPI 3.0.0 document as JSON values."""
    structs = (CommandMessage, AnswerMessage, StatusMessage, CloudEvent, Claims)
    _, schemas = msgspec.json.schema_components(structs, ref_template="#/components/schemas/{name}")
    schemas["Grant"] = schemas.pop(Claims.__name__) | {"title": "Grant", "description": GRANT}
    channels = {"status": _status(prefix), "events": _events(prefix)}
    operations = {
        "receive_status": _operation("receive", "status", channels["status"], retain=True),
        "send_events": _operation("send", "events", channels["events"]),
    }
    for kind in types.values():
        if kind.speeches:
            continue
        answers = f"{kind.name}.{_dotted(kind.answer_suffix)}"
        channels[answers] = _answers(prefix, kind)
        operations[f"receive_{answers}"] = _operation("receive", answers, channels[answers])
        for suffix in sorted(kind.command_suffixes):
            name = f"{kind.name}.{_dotted(suffix)}"
            channel = _commands(prefix, kind, suffix)
            if channel["messages"]:
                channels[name] = channel
                operations[f"send_{name}"] = _operation("send", name, channel) | {
                    "reply": {"channel": _channel(answers)},
                    "description": _behaviour(kind),
                }
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Ordain over MQTT",
            "version": __version__,
            "description": DESCRIPTION,
            "license": {"name": "Apache 2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"},
        },
        "defaultContentType": "application/json",
        "servers": {"mqtt": _server(prefix)},
        "channels": channels,
        "operations": operations,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                name: {"type": "userPassword", "description": text} for name, text in SECURITY.items()
            },
        },
    }


def _server(prefix: str) -> dict[str, Any]:
    will = {"topic": device_topic(prefix, DEVICE, "status"), "qos": 1, "message": "offline", "retain": True}
    return {
        "host": "{address}",
        "protocol": "mqtt",
        "description": "The MQTT server that devices connect to: Ordain's own server or an external one.",
        "variables": {
            "address": {
                "default": "127.0.0.1:1883",
                "description": "Host and port; see `mqtt.url` of `GET /v1/system`.",
            }
        },
        "security": [{"$ref": f"#/components/securitySchemes/{name}"} for name in SECURITY],
        "bindings": {
            "mqtt": {
                "clientId": DEVICE,
                "lastWill": will,
                "bindingVersion": "0.2.0",
            }
        },
    }


def _commands(prefix: str, kind: DeviceType, suffix: str) -> dict[str, Any]:
    own = {
        name: _command(prefix, kind, name, command)
        for name, command in kind.commands.items()
        if (command.command_suffix or kind.command_suffix) == suffix
    }
    if kind.open and suffix == kind.command_suffix:
        own["any"] = _command(prefix, kind, ANY, CommandType(title="Any other command"))
    return _topic(prefix, suffix, f"Commands to {kind.title or kind.name}", own)


def _command(prefix: str, kind: DeviceType, name: str, command: CommandType) -> dict[str, Any]:
    answers = device_topic(prefix, DEVICE, kind.answer_suffix)
    properties: dict[str, Any] = {
        "attempt": {"type": "string", "description": "The number of the attempt, from 1."}
    }
    if kind.grants != "none" and kind.payload != "bare":
        properties["grant"] = {"type": "string", "description": "The same as `grant` in the payload."}
    message: dict[str, Any] = {
        "name": f"{kind.name}.{name}",
        "title": command.title or name,
        "contentType": CONTENT[kind.payload],
        "headers": {
            "type": "object",
            "description": "MQTT 5 user properties.",
            "properties": properties,
        },
        "payload": _payload(kind, name, command),
        "bindings": {
            "mqtt": {
                "correlationData": {"type": "string", "description": "The command's id."},
                "responseTopic": answers,
                "bindingVersion": "0.2.0",
            }
        },
    }
    if name != ANY and not kind.definition(name).repeatable:
        message["description"] = "Sent at most once."
    if kind.payload != "bare":
        message["correlationId"] = {"location": "$message.payload#/id"}
    if command.result is not None:
        message["x-ordain-result"] = command.result
    return message


def _payload(kind: DeviceType, name: str, command: CommandType) -> dict[str, Any]:
    if kind.payload == "bare":
        return {"type": "string", "const": command.text}
    called: dict[str, Any] = {"const": name}
    if name == ANY:
        called = {"type": "string", "pattern": NAME_PATTERN}
        if kind.commands:
            called["not"] = {"enum": list(kind.commands)}
    params = command.params or ({} if kind.any_params else {"type": "object"})
    return {
        "allOf": [
            {"$ref": "#/components/schemas/CommandMessage"},
            {"type": "object", "properties": {"type": called, "params": params}},
        ]
    }


def _answers(prefix: str, kind: DeviceType) -> dict[str, Any]:
    messages: dict[str, Any] = {
        "answer": {
            "name": f"{kind.name}.answer",
            "title": "An answer",
            "contentType": CONTENT["msgpack" if kind.payload == "msgpack" else "json"],
            "payload": {"$ref": "#/components/schemas/AnswerMessage"},
        }
    }
    if kind.answers_signed != "none":
        messages["signed"] = {
            "name": f"{kind.name}.signed",
            "title": "A signed answer",
            "description": "A JWS in compact form. Its payload is the answer, with the hardware id as `iss`; "
            "progress has a rising `seq`.",
            "contentType": "application/jose",
            "payload": {"type": "string", "pattern": "^eyJ[^.]+\\.[^.]+\\.[^.]+$"},
        }
    if kind.answers_signed == "required":
        del messages["answer"]
    if kind.words:
        meaning = "; ".join(f"`{word}`: {status}" for word, status in kind.words.items())
        messages["text"] = {
            "name": f"{kind.name}.text",
            "title": "An answer in one word",
            "description": f"{meaning}. It counts for the device's only command that can get this answer.",
            "contentType": CONTENT["bare"],
            "payload": {"type": "string", "enum": list(kind.words)},
        }
    return _topic(prefix, kind.answer_suffix, f"Answers of {kind.title or kind.name}", messages)


def _status(prefix: str) -> dict[str, Any]:
    """The channel of device statuses. Needed with an external MQTT server; the embedded server sees
    connections itself."""
    word = {"type": "string", "enum": ["online", "offline"]}
    messages = {
        "word": {"name": "status.word", "contentType": CONTENT["bare"], "payload": word},
        "status": {"name": "status", "payload": {"$ref": "#/components/schemas/StatusMessage"}},
    }
    return _topic(prefix, "status", "Device online or offline; `offline` is its last will", messages)


def _events(prefix: str) -> dict[str, Any]:
    event = {
        "name": "event",
        "contentType": "application/cloudevents+json",
        "payload": {"$ref": "#/components/schemas/CloudEvent"},
    }
    return {
        "address": f"{prefix}/evt/{DEVICE}/{{command_id}}",
        "title": "Events of commands for services; delivered at least once, in order for each command",
        "parameters": {"hardware_id": HARDWARE_ID, "command_id": {"description": "The command."}},
        "messages": {"event": event},
    }


def _topic(prefix: str, suffix: str, title: str, messages: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "address": device_topic(prefix, DEVICE, suffix),
        "title": title,
        "parameters": {"hardware_id": HARDWARE_ID},
        "messages": dict(messages),
    }


def _operation(action: str, name: str, channel: Mapping[str, Any], *, retain: bool = False) -> dict[str, Any]:
    return {
        "action": action,
        "title": channel["title"],
        "channel": _channel(name),
        "messages": _references(name, channel["messages"]),
        "bindings": {"mqtt": QOS_1 | {"retain": retain}},
    }


def _channel(name: str) -> dict[str, str]:
    return {"$ref": f"#/channels/{name}"}


def _references(name: str, messages: Iterable[str]) -> list[dict[str, str]]:
    return [{"$ref": f"#/channels/{name}/messages/{message}"} for message in messages]


def _behaviour(kind: DeviceType) -> str:
    """How the broker sends commands to a device of this type."""
    held = (
        "Held until the device is online."
        if kind.presence == "required"
        else "Sent whether the device is online or not."
    )
    window = f"At most {kind.max_in_flight} in flight at once."
    if kind.completes_on == "published":
        return f"{held} {window} The broker does not wait for an answer."
    again = f"Without an answer it is sent again with the same id, at most {kind.max_attempts} times in all."
    return f"{held} {window} {again}"


def _dotted(suffix: str) -> str:
    return suffix.replace("/", ".")
