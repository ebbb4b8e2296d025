"""The two operations this project exists for: attention to the exact block cache, and the vocabulary without logits."""
