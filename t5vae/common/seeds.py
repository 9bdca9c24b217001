"""The seeds that torch's generators take."""

FIRST_SEED, LAST_SEED = -(2**63), 2**64 - 1
"""A negative one is another name of one from 2^63 on: -1 of the last."""
