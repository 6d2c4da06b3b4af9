"""Processes, files, errors, signals, random numbers, progress: what every floor above uses."""
