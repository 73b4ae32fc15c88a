"""What training reads: image folders, the image <-> latent codec, and the store of cached latents."""
