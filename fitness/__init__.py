"""How a genome is judged and remembered: metrics, objectives, Pareto maths, trials, the ledger.

Scores anything that gives the loss of its tokens; knows nothing of how it was trained, or by whom.
"""
