"""What the sampling scripts share: draws by image number, the generate iterator, grids and writers."""
