"""Speaking with bought devices: their topics, answers and states, as their types describe them."""
