"""What all rooms stand on: errors, files written whole, progress. It imports nothing of ours."""
