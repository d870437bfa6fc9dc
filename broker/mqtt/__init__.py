"""Everything that speaks MQTT: the client link, and the server devices connect to."""
