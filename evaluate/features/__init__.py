"""Feature pages: for each latent of one SAE what it fires on, what it writes and which latents are near it."""
