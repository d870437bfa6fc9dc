"""The parts that all routes share: HTTP protocol limits, key checks, errors, pages of lists, streams."""
