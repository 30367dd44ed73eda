"""From numbers to words and figures: statistics, claims, result files, plots.

In: measured values of items and runs. Out: estimates with intervals, result files, words, figures.
"""
