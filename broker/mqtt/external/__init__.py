"""An MQTT server that is not Ordain's: its users and rules kept in step with the devices, and tried."""
