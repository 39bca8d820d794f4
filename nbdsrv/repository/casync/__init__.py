"""casync's and desync's images: an index of chunks, and the store they lie in."""
