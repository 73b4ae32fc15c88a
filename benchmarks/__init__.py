"""Speed and memory, measured against plain reference formulations in the same run."""
