"""One question, one file, one `config()`."""
