"""The pattern language and the rules, grouped by operator family."""
