"""Answers of real models, and who judges them.

In: prompts and a model, or requests and answers. Out: files of answers, grades, agreement.
"""
