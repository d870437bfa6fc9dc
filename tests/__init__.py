"""A regular package: some installed packages bring a package named `tests` too, and this one must win."""
