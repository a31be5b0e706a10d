"""Generate text from prompts or from files of samples."""
