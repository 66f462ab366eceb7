"""Loads: from DCP's plan to bytes in their destinations."""
