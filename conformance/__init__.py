"""Real programs against our server: a table of program x feature.

Nothing here stands in for a peer. A check starts ``nbdsrv serve`` as a user would, lets
someone else's program talk to it, and compares what came out with the bytes of the image.
"""
