"""Training of retention gates: the losses, the data and `trimkv-train`."""
