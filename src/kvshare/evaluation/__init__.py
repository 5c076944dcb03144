"""What a model's text is worth: perplexity on given text."""
