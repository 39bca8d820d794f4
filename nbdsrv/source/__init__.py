"""Where disks come from that are not files here: other servers and hypervisors."""
