"""Preference pairs: readers, labels, filters, order, and the loader that decodes ahead."""
