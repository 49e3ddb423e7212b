"""What both ends must agree on to the bit: messages, frames, updates, programs' manifests, errors.

The leaf of the import graph: standard library, numpy, pydantic and cryptography only.
"""
