"""Backup repositories beside each other: how fast they take a disk, give it back and serve it.

::

    cells          what is measured, by which programs, and the bar of each cell
    disk           a VM-like disk in three states, 2 % apart, raw and as qcow2 with a bitmap
    command        one program on the clock, until what it wrote is on the disk; cold files
    service        an NBD server or a FUSE mount, started and stopped
    reading        fio, on either
    subject        the seam: what a program under test has to be able to do
      ours  benji  restic  borg  qemu_img  virtnbdbackup
    benji_setup    Benji's virtual environment, made once, and its repair
    virtnbd_driver virtnbdbackup's own functions without a libvirt daemon
    rounds         the interleaving
    table          medians and ratios
"""
