"""What lies on disk: the index, blocks, the tokenizer."""
