"""Training on several ranks: the world, the ring, lost ranks."""
