"""Handles commands: decides, appends to the log, hands over and takes in answers. Imports only the seams."""
