"""Backing up: what is read, what is kept of it, and where it goes."""
