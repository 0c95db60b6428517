"""Pack a manifest's samples into shards with fast random access."""
