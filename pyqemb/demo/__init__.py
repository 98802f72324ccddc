"""The whole recipe as one script: tokenizer, two training stages, mining, merging, evaluation, a report."""
