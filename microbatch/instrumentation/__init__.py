"""Numbers and traces for other people's tools, one module each."""
