"""nbdsrv: an NBD server, proxy and client for backup and instant restore of virtual machines."""

__all__ = ["__version__"]

__version__ = "0.1.0"
