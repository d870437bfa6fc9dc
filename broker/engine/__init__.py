"""Carries commands: decides, appends to the log, hands over and takes in answers. Knows the seams only."""
