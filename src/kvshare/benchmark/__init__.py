"""How fast a loaded model runs here, and how fast this machine would let it."""
