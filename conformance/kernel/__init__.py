"""The Linux kernel's own NBD client, in a guest under plain emulation.

raw file  <-  our server on 127.0.0.1  <-  user networking (10.0.2.2)  <-  nbd.ko  <-  ext4
"""
