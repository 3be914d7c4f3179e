"""From logits to text: sampling, stopping, detokenising, chat formats."""
