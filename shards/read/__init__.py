"""From shards to batches, in an order that depends on nothing but seed and position."""
