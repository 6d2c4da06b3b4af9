"""Processes, files, errors, signals, random numbers, progress: what every package above uses."""
