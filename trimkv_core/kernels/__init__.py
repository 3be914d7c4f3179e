"""Triton kernels over paged memory on the device, one job a file; see `memory.py` for what they work on."""
