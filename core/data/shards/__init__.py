"""A folder of shards: its manifest, its check, and the stream of its tokens."""
