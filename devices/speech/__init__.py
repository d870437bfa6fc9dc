"""How devices that were bought speak: topics, payloads, answers and states, described without code."""
