"""Environment, ports and proxy of the Ray Serve processes."""
