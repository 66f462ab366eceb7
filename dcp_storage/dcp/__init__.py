"""torch: DCP's storage classes and planners, and tensors as bytes. Nothing below this layer knows torch."""
