"""Latents, text embeddings and inversion trajectories on disk."""
