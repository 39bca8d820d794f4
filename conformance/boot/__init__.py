"""A small Linux that boots by itself from a disk: built here, served by whoever, run by QEMU.

::

    disk     a disk with a boot loader, a kernel and an ext4, as an installer leaves it
    machine  QEMU (TCG) that boots from it, and a shell on its serial console
    served   our server on one address, which can be killed and started again
"""
