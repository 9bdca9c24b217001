"""From text to shards."""
