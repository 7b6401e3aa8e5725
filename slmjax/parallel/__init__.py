"""Device mesh, parameter sharding rules, communication inside `shard_map`, and runs of several processes."""
