"""Arithmetic modulo a Mersenne prime, on blocks that stay in the cache, in plain numpy."""

from client_sdk.protocol.mersenne.blocks import BLOCK, SMALL_LIMIT, Block, BlockArithmetic, FieldVector, slices
from client_sdk.protocol.mersenne.m61 import Blocks61
from client_sdk.protocol.mersenne.m127 import Blocks127

__all__ = ["BLOCK", "SMALL_LIMIT", "Block", "BlockArithmetic", "Blocks61", "Blocks127", "FieldVector", "slices"]
