"""One module per program (or kind of transport), each registering its checks."""
