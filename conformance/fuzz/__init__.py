"""Hostile images: every reader is given mutants of valid ones, in a process that may die.

::

    specimens/   small valid images of every format and sub-format, by real tools or by builders
    specimen     what one is: its files, what a reader must find in it, where its metadata lies
    mutations    bits, fields, tables, loops, lengths, text: what is done to a file
    mending      checksums made right again, or most mutants would end at the first check
    cases        by number: which specimen, mutated how
    examine      opens one mutant, reads it, and judges what the reader made of it
    change       writes to one that may be written to
    peer         what qemu-img makes of those that were accepted
    victim       the child process: a case after another, each told before it begins
    hunt         the parent: deadlines, memory, restarts, findings kept for reproduction
    replay       a finding once more
    report       the table format x cases x accepted x refused x findings
    __main__     the command line

A reader passes a case by serving it consistently, or by a DiskError of one line that names the file
(and, for CorruptImage, the offset). Anything else is a *finding*: another exception, a crash, a
hang, memory, a leaked descriptor, bytes from outside the image's files, a hole that is not zero.

A case is determined by seed, format and number. The specimens are not: the tools put the time of
day and random identifiers into them. So the bytes of a finding are kept; ``--replay`` takes them.
"""
