"""Proxmox Backup Server's datastores, read as they lie on disk."""
