"""Room 4: predictions and pictures of them."""
