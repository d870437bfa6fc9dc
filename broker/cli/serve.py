"""`ordain serve`: the broker itself. The only command of the command line that loads all of it."""

from __future__ import annotations

import os
from typing import Annotated

import uvloop
from cyclopts import Parameter

from broker.cli import logs
from broker.cli.base import Config, Data, Text, settings_of
from broker.serve import serve as serve_until_signal


def serve(
    *,
    data: Data = None,
    node: Text = None,
    advertise: Text = None,
    http: Text = None,
    mqtt_listen: Text = None,
    mqtt_server: Text = None,
    mqtt_url: Text = None,
    config: Config = None,
    demo: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Run the broker until SIGTERM or Ctrl-C.

    Parameters
    ----------
    node
        Name of this node, where several share a log; else ORDAIN_NODE, else the machine's name.
    advertise
        HOST:PORT at which the other nodes reach this one's HTTP server; else ORDAIN_ADVERTISE. Needs a log in
        PostgreSQL, and mqtt_url, cluster_secret_file and key_pepper_file in the settings.
    http
        HOST:PORT of the HTTP server; else ORDAIN_HTTP, else 127.0.0.1:8080.
    mqtt_listen
        HOST:PORT of the embedded MQTT server; else ORDAIN_MQTT_LISTEN, else 127.0.0.1:1883.
    mqtt_server
        The broker's own MQTT server: embedded, or mosquitto as a child process; else ORDAIN_MQTT_SERVER, else
        embedded.
    mqtt_url
        Use this external MQTT server instead, mqtt://user:password@host:port; else ORDAIN_MQTT_URL.
    demo
        Also run a few simulated devices, and print a curl to try.
    """
    settings = settings_of(
        data=data,
        node=node,
        advertise=advertise,
        http=http,
        mqtt_listen=mqtt_listen,
        mqtt_server=mqtt_server,
        mqtt_url=mqtt_url,
        config=config,
    )
    logs.configure(settings, os.environ)
    uvloop.run(serve_until_signal(settings, demo=demo, say=lambda text: print(text, flush=True)))
