"""The command lines of SiT with attention mediators."""
