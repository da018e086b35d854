"""Text generation: `generate`, prompts and sampling."""
