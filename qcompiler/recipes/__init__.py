"""Recipes: named defaults, as TOML."""
