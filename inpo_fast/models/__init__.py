"""Model families behind one interface, their weights, and their fast paths."""
