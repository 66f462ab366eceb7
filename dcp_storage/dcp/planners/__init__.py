"""What is read and written, by whom: the planners, and the pure parts that they are made of."""
