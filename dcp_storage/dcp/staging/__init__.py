"""The copy that `dcp.async_save` makes before it returns, and its memory."""
