"""The planners, which decide what is read and written by whom, and their pure parts."""
