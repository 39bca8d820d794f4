"""Other tools' repositories: how long until the first byte, how fast small reads are.

Rows are registered by the modules named in ``rows.MODULES``; a new one is a function.
"""
