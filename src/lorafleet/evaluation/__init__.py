"""Loss, perplexity, label accuracy, exact match."""
