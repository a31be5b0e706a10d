"""A Ray Serve application that answers OpenAI's completions interface with parallel branches."""
