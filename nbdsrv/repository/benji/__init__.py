"""Benji's storages, read as they are."""
