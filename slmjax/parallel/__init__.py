"""Device mesh, parameter sharding rules, communication inside `shard_map`, and runs of several processes.

Files in reading order:

- mesh.py: the mesh, its axes and the logical dims
- rules.py: parameter path and shape to PartitionSpec
- communication.py: sharding constraints, `shard_map` and collectives
- batches.py: which sequences a process reads, and global arrays
- hosts.py: how the processes of a run find each other
- processes.py: order, messages and signals between processes
- agreement.py: checks that all processes do the same
"""
