"""Batches on a device: prepared from samples and copied while the previous step runs.

`device` defines copies and waiting on a CPU and on a GPU. `pixels` turns uint8 pictures into model input, for training and
scoring. `ring` prepares batches in advance. Used from outside: `device_of`, `Pixels`, `feed`, `ready`.
"""
