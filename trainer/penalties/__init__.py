"""Terms that are read from activations and added to the loss, on top of any adapter."""
