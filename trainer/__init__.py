"""How a recipe becomes a model: data, model, training, later stages, export.

Knows nothing of searches, trials or scores: it gets a callback `report(progress) -> keep_going` and returns a record.
"""
