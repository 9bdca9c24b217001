"""A run on disk: what is saved, what it goes on from, what is exported."""
