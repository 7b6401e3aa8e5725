"""The device mesh, rules that place arrays on it, communication inside `shard_map`, and processes on several
hosts.
"""
