"""Xen Orchestra's backup repositories: VHDs, directories of VHD blocks, and XVAs.

Facts about the format come from reading what Xen Orchestra writes; no code of it is here.
"""
