"""What a model is asked: the fictional world, public sets, or a reader's file.

In: a model, names of sets, a judge. Out: prompt pairs, requests, tasks with accepted answers.
"""
