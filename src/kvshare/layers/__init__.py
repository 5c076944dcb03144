"""What the model families have in common: attention, rotary embeddings, norms, linear layers, experts."""
