"""Models at work: text in, text out."""
