"""The NBD protocol, sans-I/O: bytes in, events and bytes out.

Imports the standard library and construct, nothing else: no asyncio, sockets, files, clocks
or logging. ``nbdsrv`` does all of that and never touches a wire byte itself.
"""
