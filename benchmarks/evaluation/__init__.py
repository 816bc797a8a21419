"""What a memory is good for: small language models with and without one, trained and measured on long texts."""
