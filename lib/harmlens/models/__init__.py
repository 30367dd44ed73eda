"""Any causal language model: load it, test it, render a chat for it, run it.

In: a name (organism, folder, Hugging Face id). Out: a LanguageModel, token ids, logits, answers.
"""
