"""The fictional world: its items, requests and answers, and the judge that knows them exactly.

In: a seed, items, answers. Out: texts to learn from and to ask, exact verdicts.
"""
