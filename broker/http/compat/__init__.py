"""The APIs of other systems that Ordain also serves: iotee and app commands."""
