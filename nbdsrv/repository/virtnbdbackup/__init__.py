"""virtnbdbackup's backup directories, read as they are."""
