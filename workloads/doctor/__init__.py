"""Check an installation or a cluster."""
