"""Manifests to shards that are quick to read at random."""
