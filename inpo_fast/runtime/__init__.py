"""Processes, files, errors, signals, random numbers, progress: what every room above uses."""
