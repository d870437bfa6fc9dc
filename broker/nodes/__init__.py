"""Several brokers on one log: who owns it, and how the others pass requests on to that one."""
