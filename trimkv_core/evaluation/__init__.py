"""What eviction costs: every method answers the same probes under one regime, with entries truly gone."""
