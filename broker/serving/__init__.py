"""What `ordain serve` consists of: what a process that owns a log runs, HTTP servers, several nodes."""
