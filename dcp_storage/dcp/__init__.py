"""The torch layer: DCP's storage classes and planners, and tensors as bytes. Nothing below it imports torch."""
