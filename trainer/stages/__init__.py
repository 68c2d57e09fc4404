"""The stages of a full training run; each leaves a folder with its recipe, record, metrics and final weights."""
