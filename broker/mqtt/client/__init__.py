"""The client of any other MQTT server: our link to it."""
