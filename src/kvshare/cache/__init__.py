"""The cache's three questions, each an object of its own: which bytes (`arena`), whose rows (`tables`), what a forward pass sees (`step`)."""
