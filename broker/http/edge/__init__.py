"""What every request passes: protocol checks, keys, errors, pages."""
