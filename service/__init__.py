"""The service: HTTP in, tokens out, a budget for every request."""
