"""Search a space of training runs."""
