"""What each engine reads at which version, and the preflight of an export: the rules are data, in targets.yaml."""
