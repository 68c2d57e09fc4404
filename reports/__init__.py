"""How it is shown: frames, figures, pages, tables. Works from plain data: it needs neither torch nor Ray nor a
cluster."""
