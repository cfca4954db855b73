"""Arithmetic on blocks of a model: cutting tensors into spans, threads, masks, exact ranks.

A block is a numpy array in memory or a torch tensor on a device. No result depends on the size of blocks, on threads, or on the
device. `reading`, `kernels` and `counting` hold compiled loops; only modules that run merges import them.
"""
