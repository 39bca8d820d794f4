"""A simulator of an XCP-ng pool, as far as a backup sees it. It is no XCP-ng.

::

    one process                       what answers                          module
    https  /jsonrpc  /                XAPI: JSON-RPC 2.0, XML-RPC           web, rpc, calls
           /export_raw_vdi  /import_raw_vdi                                 web, streams
    nbd    one server per host        xapi-nbd with its quirks              nbd
    memory VMs, VDIs, tasks ...       the database and the storage manager  pool, tracking
    unix   lines of JSON              the test's hand: write, break         control

What it does is what XAPI's and sm's sources say; where nobody could look it up, the docstring says
so. Hosts are addresses of loopback (127.0.0.1 is the master, then 127.0.0.2 ...).

    python -m conformance.xapi --directory DIR [--hosts N] [--insecure-nbd] [--lifetime S]

It ends when its standard input does, or after its lifetime.
"""
