"""Trained models in the forms that others load, each checked against the model that was trained."""
