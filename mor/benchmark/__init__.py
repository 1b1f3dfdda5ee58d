"""What `mor bench` measures."""
