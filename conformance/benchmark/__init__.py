"""Speed as ratios in one run: our server beside nbdkit and qemu-nbd on the same files.

::

    __main__     the command line
    cells        what is measured, and the bar of each cell
    image        the files: made once, warmed, proven resident, evicted
    servers      the three programs, started and stopped
    tls          one throw-away certificate authority and server certificate
    load         fio and nbdcopy, run and understood
    rounds       the interleaving: rounds, then cells, then servers in rotating order
    report       every number taken, and how it is stored
    table        medians, ratios, bars: as text and as the README's table
    formats      the same content as images of other formats, compressed and not
    convert      nbdsrv copy beside qemu-img convert
    reading      nbdsrv copy beside nbdcopy, also over a way that takes 50 ms
    environment  the machine and the programs a number comes from
    cold         a second client's latency while another one's file comes from a disk
    slowdisk     a mounted file system every uncached read of which takes a fixed time
    idle         1 000 idle connections, and clients that never read their replies
    repository   backup programs and their repositories: a package of its own
    client       the few raw handshakes `idle` needs
"""
