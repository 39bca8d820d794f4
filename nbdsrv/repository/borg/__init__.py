"""borg's repositories (1.1 to 1.4): images inside archives, read through borg's own Python API."""
