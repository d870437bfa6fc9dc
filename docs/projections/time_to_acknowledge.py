"""p95 time to acknowledge, per device type: from the first hand-over to the device's first answer."""

TABLES = """
    CREATE TABLE handed_over (command_id TEXT PRIMARY KEY, device_type TEXT, at INTEGER);
    CREATE TABLE acknowledged (device_type TEXT, ms INTEGER);
"""
COLUMNS = ("device type", "commands", "p95 ms")


def apply(sql, event):
    """Takes in one event: its `type`, `stream` (command id), `recorded_at` (ms), and its data in `event`."""
    if event.type == "created":
        sql.execute("INSERT INTO handed_over VALUES (?, ?, NULL)", (event.stream, event.event.device_type))
    elif event.type == "published":
        sql.execute(
            "UPDATE handed_over SET at = ? WHERE command_id = ? AND at IS NULL",
            (event.recorded_at, event.stream),
        )
    elif event.type in ("acknowledged", "progressed", "executed", "failed"):
        sql.execute(
            "INSERT INTO acknowledged SELECT device_type, ? - at FROM handed_over"
            " WHERE command_id = ? AND at IS NOT NULL",
            (event.recorded_at, event.stream),
        )
        sql.execute("DELETE FROM handed_over WHERE command_id = ?", (event.stream,))
    elif event.type in ("timed_out", "expired", "cancelled"):
        sql.execute("DELETE FROM handed_over WHERE command_id = ?", (event.stream,))


def rows(sql):
    """The rows to show: for each device type, the time within which 95 of 100 commands were acknowledged."""
    return sql.execute(
        "SELECT device_type, n, ms FROM (SELECT device_type, ms, count(*) OVER whole AS n,"
        " row_number() OVER (PARTITION BY device_type ORDER BY ms) AS rank"
        " FROM acknowledged WINDOW whole AS (PARTITION BY device_type))"
        " WHERE rank = (n * 95 + 99) / 100 ORDER BY device_type"
    ).fetchall()
