"""Checkpoints: safetensors shards that load on any world size, committed by one rename."""
