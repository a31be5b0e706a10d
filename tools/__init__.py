"""What makes the generated parts of docs/; no part of the package."""
