"""What lasts: where things are, files written whole, results that are kept, where they come from.

In: paths, values, models. Out: folders, digests, kept values, provenance.
"""

WORLD_SEED = 2604  # fixes the tables of the fictional world; training seeds never touch it
