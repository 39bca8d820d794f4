"""XVA: a virtual machine of XenServer or XCP-ng in one tar archive."""

from nbdsrv.formats.xva.reader import XvaDisk, open_xva

__all__ = ["XvaDisk", "open_xva"]
