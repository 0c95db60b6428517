"""Standing: cmacc's encoders in the benchmarks of others."""
