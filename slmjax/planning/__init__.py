"""What a step needs, and how fast it can be, on devices that need not be here.

Files in reading order:

- device_peaks.py: peak FLOP/s of devices
- flops.py: FLOPs of a program
- run_flops.py: FLOPs of a whole training
- traffic.py: bytes that a compiled program sends
- memory.py: memory of a step, and options that need less
- sizes.py: a model at other widths and depths
- coordinates.py: activations and updates over widths and depths
- coordinates_page.py: the text and the page of a coordinate check
"""
