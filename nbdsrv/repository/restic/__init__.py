"""restic's repositories (versions 1 and 2): images inside snapshots, read as restore points."""
