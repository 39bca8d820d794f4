"""The handshake, both roles: option haggling up to the transmission phase.

``options`` holds what both roles share, ``server`` and ``client`` one state machine each.
All of it is sans-I/O: bytes in, events and bytes out.
"""
