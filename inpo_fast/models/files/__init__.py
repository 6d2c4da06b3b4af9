"""Model files of every kind: recognised, checked, read and written."""
