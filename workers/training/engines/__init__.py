"""One optimiser step at a time, by torch alone or by DeepSpeed, behind one protocol."""
