"""The engine's own decoder step over loaded weights: fewer and larger operations than a stock forward."""
