"""From records to a folder of shards: scan, split, encode, build, reuse."""
