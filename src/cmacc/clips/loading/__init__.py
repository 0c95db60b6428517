"""Manifests to batches: the plan, the workers that decode it, augmentation, log-mel."""
