"""Restore points: our own repository, and those of other tools, behind one interface."""
