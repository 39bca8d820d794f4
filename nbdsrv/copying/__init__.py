"""Copying a disk into a new image or onto another disk, and comparing two disks."""
