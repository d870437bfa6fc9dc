"""The rules of commands: events, states, decisions, lanes. Pure: no clock, disk or network."""
