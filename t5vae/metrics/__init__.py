"""Writers and readers of a run's metrics.jsonl."""
