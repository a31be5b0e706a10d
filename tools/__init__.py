"""Scripts that write the generated parts of docs/. They are not part of the package."""
