"""The Disk: one representation of a disk whatever its source, and the threads that serve it."""
