"""The one model type, and what can be read from it or done to it without knowing any technique."""
