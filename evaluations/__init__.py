"""ADM-style metrics of generated images: feature extractors, metrics, and the scripts evaluator.py and reference.py."""
