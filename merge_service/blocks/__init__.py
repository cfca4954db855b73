"""Arithmetic over blocks of a model: cutting tensors into spans, working on them on threads, masks, exact ranks.

A block lies in memory as a numpy array or on a device as a torch tensor. No result depends on how a model is cut into blocks, on
threads, or on where the blocks are. `kernels` holds compiled loops; only what runs merges imports it.
"""
