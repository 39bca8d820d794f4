"""Image formats: each a module that translates addresses, and the probe that tells them apart."""
