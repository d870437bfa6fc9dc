"""The surfaces of other systems that Ordain also serves: iotee and the app commands."""
