"""What `dcp.async_save` copies before it returns, and the memory that it is copied to."""
